"""What a compiled program does, read line by line from the text of its optimised HLO.

The entry computation lists what runs; a fusion is one kernel, a loop's body runs trip-count times.
That gives kernels, bytes and collectives of a step without running it. Bytes are an estimate of
traffic: every operand and result of a kernel once, caches ignored.
"""

import collections
import hashlib
import math
import re
from typing import NamedTuple

ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\]")
# Bookkeeping that launches nothing.
FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
                  "partition-id", "replica-id", "opt-barrier", "domain", "add-dependency"})
FREE_CALLS = frozenset({"AllocateBuffer", "Sharding", "SPMDFullToShardShape", "xla.sdy.Sharding"})
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all",
               "collective-broadcast")
# What differs between two compilations of one program without the program differing.
ORIGIN = re.compile(r', (?:metadata=\{(?:[^{}"]|"[^"]*")*\}|stack_frame_id=\d+)')
ORIGIN_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
OP_NAME = re.compile(r'[{ ]op_name="((?:[^"\\]|\\.)*)"')
SLICES = frozenset({"slice", "dynamic-slice", "gather"})


class Instruction(NamedTuple):
    """One line. type: its shape as written; operands: names; rest: the attributes as written."""

    name: str
    opcode: str
    type: str
    operands: list[str]
    rest: str

    def attribute(self, key: str) -> str | None:
        """The value after `key=`, up to the next comma or brace; quotes and % removed."""
        at = self.rest.find(f" {key}=")
        if at < 0:
            return None
        value = self.rest[at + len(key) + 2:].lstrip('{"%')
        return re.split(r"[,} ]", value, maxsplit=1)[0].strip('"%')


class Program(NamedTuple):
    """computations: name -> instructions in order; entry: name of the one that runs."""

    computations: dict[str, list[Instruction]]
    entry: str


class Kernel(NamedTuple):
    """One launch. name: as XLA names it, without number; kind: a row of CLASSES; bytes: operands
    and results in full; sliced: only the parts of them that are touched, where they are sliced;
    flops: of a convolution of cuDNN, else 0; runs: how often a call of the program runs it."""

    name: str
    kind: str
    bytes: int
    sliced: int
    flops: int
    runs: int


def op_name(instruction: Instruction) -> str:
    """Path of the source's operation, such as 'jit(f)/jvp(UNet)/norm_out/add'; '' without one."""
    found = OP_NAME.search(instruction.rest)
    return found[1] if found else ""


def shapes(type: str) -> list[tuple[int, ...]]:
    """Of each array of a type: '(f32[2,3]{1,0}, u8[])' -> [(2, 3), ()]."""
    return [tuple(int(d.strip("<=")) for d in dims.split(",") if d.strip("<="))
            for _, dims in ARRAY.findall(type)]


def array_bytes(type: str) -> int:
    """Bytes of a type such as 'f32[8,32]{1,0}' or of a tuple of them, layouts ignored."""
    total = 0
    for item, dims in ARRAY.findall(type):
        bits = ITEM_BITS.get(item)
        if bits is None:
            bits = int(re.search(r"\d+", item)[0]) if re.search(r"\d", item) else 0
        sizes = [int(d.strip("<=")) for d in dims.split(",") if d.strip("<=")]
        total += -(-bits * math.prod(sizes) // 8)
    return total


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes text[start]."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] == "(":
            depth += 1
        elif text[at] == ")":
            depth -= 1
            if not depth:
                return at
    return len(text)


def _instruction(line: str) -> Instruction | None:
    head, equals, tail = line.partition(" = ")
    if not equals:
        return None
    name = head.split()[-1].lstrip("%")
    end = _closing(tail, 0) + 1 if tail.startswith("(") else tail.find(" ")
    type, body = tail[:end], tail[end:].lstrip()
    open_at = body.find("(")
    if open_at < 0:
        return None
    close = _closing(body, open_at)
    inside = body[open_at + 1:close]
    operands = [] if body.startswith(("constant(", "parameter(")) else re.findall(
        r"%([\w.\-]+)", inside)
    if body.startswith(("constant(", "parameter(")):
        operands = [inside[:40]]
    return Instruction(name, body[:open_at], type, operands, body[close + 1:])


def parse(text: str) -> Program:
    """The text of `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if line.endswith("{") and "->" in line and not line.startswith((" ", "HloModule")):
                words = line.split(" ", 2)
                name = (words[1] if words[0] == "ENTRY" else words[0]).lstrip("%")
                name = name.partition("(")[0]
                entry = name if words[0] == "ENTRY" else entry
                current = computations[name] = []
        elif line.startswith("}"):
            current = None
        else:
            instruction = _instruction(line)
            if instruction is not None:
                current.append(instruction)
    return Program(computations, entry)


def trip_count(program: Program, loop: Instruction) -> int | None:
    """How often a `while` runs, where the compiler states it or the condition is `i < constant`."""
    known = re.search(r'known_trip_count[^0-9]*(\d+)', loop.rest)
    if known:
        return int(known[1])
    conditions = [program.computations.get(loop.attribute("condition"), [])]
    conditions += [program.computations.get(i.attribute("calls"), [])
                   for i in conditions[0] if i.opcode == "fusion"]
    lines = [i for computation in conditions for i in computation]
    limits = [int(i.operands[0]) for i in lines if i.opcode == "constant"
              and i.type.startswith(("s32[]", "u32[]")) and i.operands[0].lstrip("-").isdigit()]
    less = [i for i in lines if i.opcode == "compare" and i.attribute("direction") == "LT"]
    return limits[0] if len(limits) == 1 and len(less) == 1 else None


class Execution(NamedTuple):
    """What a call runs: (instruction, runs) in order, and the loops: (name, trips or None)."""

    lines: list[tuple[Instruction, int]]
    loops: list[tuple[str, int | None]]
    types: dict[str, str]


def execution(program: Program) -> Execution:
    """Every launch of one call, loop bodies times their trip count (once where it is unknown)."""
    out = Execution([], [], {})

    def walk(computation: str, runs: int):
        for i in program.computations.get(computation, []):
            out.types[i.name] = i.type
            if i.opcode == "while":
                trips = trip_count(program, i)
                out.loops.append((i.name, trips))
                walk(i.attribute("body"), runs * (1 if trips is None else trips))
            elif i.opcode == "call":
                walk(i.attribute("to_apply"), runs)
            elif i.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
                names = (re.findall(r"%([\w.\-]+)", branches[1]) if branches else
                         [i.attribute("true_computation"), i.attribute("false_computation")])
                walk(max(names, key=lambda n: len(program.computations.get(n, []))), runs)
            elif i.opcode in FREE or i.opcode.endswith(("-done", "-update")):
                continue
            elif i.opcode == "custom-call" and i.attribute("custom_call_target") in FREE_CALLS:
                continue
            else:
                out.lines.append((i, runs))

    walk(program.entry, 1)
    return out


def _uses(body: list[Instruction], parameter: Instruction):
    """-> (names of a parameter in a fusion's body, bitcasts of it too; what uses it by any)."""
    same, users = {parameter.name}, []
    for x in body:
        if x.opcode in ("constant", "parameter") or not same.intersection(x.operands):
            continue
        if x.opcode == "bitcast":
            same.add(x.name)
        else:
            users.append(x)
    return same, users


def _read_bytes(body: list[Instruction], parameter: Instruction, program: Program) -> int:
    """Bytes that a fusion's body reads of a parameter: where it is only cut, those of the cuts."""
    same, users = _uses(body, parameter)
    if body[-1].name in same:  # handed on as it is, to be read by what surrounds this body
        return array_bytes(parameter.type)
    total = 0
    for x in users:
        if x.opcode in SLICES:
            total += array_bytes(x.type)
        elif x.opcode == "fusion":
            inner = program.computations.get(x.attribute("calls"), [])
            parameters = {int(y.operands[0]): y for y in inner if y.opcode == "parameter"}
            total += sum(_read_bytes(inner, parameters[k], program)
                         for k, operand in enumerate(x.operands) if operand in same)
        else:
            return array_bytes(parameter.type)
    return min(total, array_bytes(parameter.type))


def _sliced_bytes(program: Program, i: Instruction, types: dict[str, str]) -> int:
    """Bytes of a kernel where an operand that is only sliced counts by its slices."""
    full = array_bytes(i.type) + sum(array_bytes(types.get(o, "")) for o in i.operands)
    body = program.computations.get(i.attribute("calls"), []) if i.opcode == "fusion" else []
    if not body:
        return full
    total, root = array_bytes(i.type), body[-1]
    names = {x.name: x for x in body}
    for x in body:
        if x.opcode == "parameter":
            same, users = _uses(body, x)
            if (users == [root] and root.opcode == "dynamic-update-slice"
                    and root.operands[0] in same):
                # Written in place: neither this operand nor the result moves but for the update.
                total += array_bytes(names[root.operands[1]].type) - array_bytes(i.type)
            else:
                total += _read_bytes(body, x, program)
    return total


def _base(name: str) -> str:
    """'input_add_reduce_fusion.12.clone' -> 'input_add_reduce'."""
    words = [w for w in name.split(".") if not w.isdigit() and w not in ("clone", "remat")]
    return ".".join(words).removesuffix("_fusion") or name


def _cudnn_flops(i: Instruction, types: dict[str, str]) -> int:
    """2 x weights x images x pixels of the smaller map; 0 for anything but a cuDNN convolution."""
    target = i.attribute("custom_call_target") or ""
    if not target.startswith("__cudnn$conv") or len(i.operands) < 2:
        return 0
    result, first, second = (shapes(t)[0] for t in (
        i.type, types[i.operands[0]], types[i.operands[1]]))
    weights, *maps = ((result, first, second) if "Filter" in target else (second, first, result))
    features = (i.attribute("dim_labels") or "b01f").partition("_")[0].index("f")
    return 2 * math.prod(weights) * min(math.prod(m) // m[features] for m in maps)


class Launch(NamedTuple):
    """What the class of a kernel is read from. name: as Kernel's; opcodes: its own and those of
    its fusion; source: the custom call's target and the `op_name`s; type: of its result."""

    name: str
    opcodes: set[str]
    source: str
    type: str

    @property
    def reduces(self) -> bool:
        return "reduce" in self.name or "reduce" in self.opcodes

    @property
    def one_shape(self) -> bool:
        """Whether the results are several of one shape: sums that share their operands."""
        found = shapes(self.type)
        return len(found) > 1 and len(set(found)) == 1


# First match names the class. The three kinds of reduction run at very different rates on a GPU
# (rates.py).
CLASSES = {
    "collective": lambda k: any(o.removesuffix("-start") in COLLECTIVES for o in k.opcodes),
    "convolution": lambda k: "convolution" in k.opcodes or "conv" in k.name.split(
        "convert")[0].split("-") or "$conv" in k.source,
    "matrix product": lambda k: "dot" in k.opcodes or "gemm" in k.name or "$gemm" in k.source
        or "cublas" in k.source,
    "random bits": lambda k: "rng-bit-generator" in k.opcodes or "random_bits" in k.source
        or "threefry" in k.source,
    "concatenation": lambda k: "concatenate" in k.name,
    "reduction in a loop fusion": lambda k: k.name.startswith("loop_") and "reduce" in k.name,
    "reduction to several sums": lambda k: k.reduces and k.one_shape,
    "reduction": lambda k: k.reduces,
    "copy and transposition": lambda k: k.name.startswith(
        ("copy", "transpose", "input_transpose", "wrapped_transpose", "loop_transpose",
         "wrapped_copy", "bitcast")),
    "elementwise": lambda k: True,
}


def kernels(program: Program, run: Execution) -> list[Kernel]:
    """One Kernel for each instruction that launches something."""
    out = []
    for i, runs in run.lines:
        body = program.computations.get(i.attribute("calls"), []) if i.opcode == "fusion" else []
        opcodes = {i.opcode} | {x.opcode for x in body}
        source = " ".join([i.attribute("custom_call_target") or "", *map(op_name, [i, *body])])
        launch = Launch(_base(i.name), opcodes, source, i.type)
        kind = next(kind for kind, test in CLASSES.items() if test(launch))
        full = array_bytes(i.type) + sum(array_bytes(run.types.get(o, "")) for o in i.operands)
        out.append(Kernel(launch.name, kind, full, _sliced_bytes(program, i, run.types),
                          _cudnn_flops(i, run.types), runs))
    return out


def _table(kernels: list[Kernel], key: str) -> dict:
    rows: dict[str, dict[str, int]] = {}
    for k in kernels:
        row = rows.setdefault(getattr(k, key), {"kernels": 0, "bytes": 0, "bytes_sliced": 0})
        for field, value in (("kernels", 1), ("bytes", k.bytes), ("bytes_sliced", k.sliced)):
            row[field] += k.runs * value
        if k.flops:
            row["flops"] = row.get("flops", 0) + k.runs * k.flops
    return dict(sorted(rows.items(), key=lambda item: -item[1]["bytes"]))


def summary(text: str) -> dict:
    """Everything countable in one optimised program, as plain data; see the module's docstring."""
    program = parse(text)
    every = [i for lines in program.computations.values() for i in lines]
    run = execution(program)
    launched = kernels(program, run)
    collectives: dict[str, dict[str, int]] = {}
    for i, runs in run.lines:
        name = i.opcode.removesuffix("-start")
        if (i.attribute("calls") or "").startswith("all-reduce-scatter"):
            name = "reduce-scatter"  # a TPU's is a fusion
        if name in COLLECTIVES:
            row = collectives.setdefault(name, {"count": 0, "bytes": 0})
            row["count"] += runs
            row["bytes"] += runs * sum(array_bytes(run.types.get(o, "")) for o in i.operands)
    outside = [i for i, _ in run.lines]
    return {
        "instructions": len(every),
        "entry_instructions": len(program.computations.get(program.entry, [])),
        "opcodes": dict(collections.Counter(i.opcode for i in every).most_common()),
        "fusions": sum(i.opcode == "fusion" for i in outside),
        "copies": sum(i.opcode in ("copy", "copy-start") for i in outside),
        "transposes": sum(i.opcode == "transpose" or "transpose" in i.name for i in outside),
        "custom_calls": dict(collections.Counter(
            i.attribute("custom_call_target") for i in outside
            if i.opcode == "custom-call").most_common()),
        "collectives": collectives,
        "loops": [{"name": name, "trips": trips} for name, trips in run.loops],
        "kernels": sum(k.runs for k in launched),
        "bytes": sum(k.runs * k.bytes for k in launched),
        "bytes_sliced": sum(k.runs * k.sliced for k in launched),
        "by_class": _table(launched, "kind"),
        "by_name": _table(launched, "name"),
    }


def stablehlo_opcodes(text: str) -> dict[str, int]:
    """Operations of a StableHLO module's text by name, most frequent first."""
    counts: collections.Counter = collections.Counter()
    for line in text.splitlines():
        match = re.match(r'\s*(?:%[\w:#, ]+ = )?"?((?:stablehlo|chlo|func|call)[\w.]*)', line)
        if match and match[1] not in ("func.func", "stablehlo.return"):
            counts[match[1]] += 1
    return dict(counts.most_common())


def normalised(text: str) -> str:
    """An optimised module's text without metadata, source tables and the module's own line, its
    instructions and computations numbered in the order in which they appear."""
    lines, table = [], False
    for line in text.splitlines()[1:]:
        table = line in ORIGIN_TABLES or (table and bool(line.strip()))
        if not table:
            lines.append(ORIGIN.sub("", line))
    numbers: dict[str, str] = {}
    return re.sub(r"%[\w.\-]+", lambda m: numbers.setdefault(m[0], f"%{len(numbers)}"),
                  "\n".join(lines))


def fingerprint(text: str) -> str:
    """16 hex digits of what ``normalised`` leaves: equal for equal optimised programs."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()[:16]
