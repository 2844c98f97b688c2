"""What the paper (Ho, Jain & Abbeel 2020) and its successor (Nichol & Dhariwal 2021) report, and
when a run counts as reproducing it.

Values are the papers' own; bands are this project's, about the spread between retrainings and
between published re-evaluations of the official weights (FID 3.21 to 3.25 against the training
set, 5.27 to 5.33 against the test set).
"""

from typing import NamedTuple


class Chain(NamedTuple):
    """A sampler with published FIDs, on the paper's CIFAR-10 weights, of 50,000 samples against the
    training set. sampler: fields of config.sampler; fids: {network calls: the published ones};
    bands: {network calls: (low, high)}."""
    title: str
    sampler: dict
    fids: dict
    bands: dict


class Cell(NamedTuple):
    """One trained model of a table. values: {key: paper's number}; bands: {key: (low, high)};
    unstable: the paper gives no numbers; of: the packaged config whose cell ``name`` is."""
    name: str
    title: str
    values: dict
    bands: dict
    unstable: bool = False
    of: str = "cifar10_table2"

    @property
    def config(self) -> str:
        return f"{self.of}:{self.name}"


def _improved(name, title, bpd, fid):
    """A cell of Nichol & Dhariwal's Table 2, whose FIDs are of 50,000 samples against the training
    set. Their network differs in its heads and its timestep, so the bands are wider."""
    values = {"fid_train": fid, "bpd_test": bpd}
    return Cell(name, title, values, _around(values, fid_train=0.1, bpd_test=0.02),
                of="cifar10_improved")


def _around(values, **share):
    """A band of a relative width round each of the paper's values."""
    widths = {"fid_train": 0.06, "fid_test": 0.06, "is": 0.025, "bpd_test": 0.012,
              "bpd_train": 0.012} | share
    return {k: (round(v * (1 - widths[k]), 4), round(v * (1 + widths[k]), 4))
            for k, v in values.items()}


SIMPLE = {"is": 9.46, "fid_train": 3.17, "fid_test": 5.24, "bpd_test": 3.75, "bpd_train": 3.72}
FIXED = {"is": 7.67, "fid_train": 13.51, "bpd_test": 3.70, "bpd_train": 3.69}
CELLS = {cell.name: cell for cell in (
    Cell("mu_learned_l", "mean prediction, L, learned variance", {"is": 7.28, "fid_train": 23.69},
         _around({"is": 7.28, "fid_train": 23.69})),
    Cell("mu_fixed_l", "mean prediction, L, fixed variance", {"is": 8.06, "fid_train": 13.22},
         _around({"is": 8.06, "fid_train": 13.22})),
    Cell("mu_fixed_simple", "mean prediction, simplified objective", {}, {}, True),
    Cell("eps_learned_l", "eps prediction, L, learned variance", {}, {}, True),
    Cell("eps_fixed_l", "eps prediction, L, fixed variance", FIXED, _around(FIXED)),
    Cell("eps_fixed_simple", "eps prediction, L_simple (the paper's model)", SIMPLE,
         _around(SIMPLE) | {"is": (9.3, 9.6), "fid_train": (3.1, 3.35), "fid_test": (5.1, 5.4)}),
)}

CELLS |= {cell.name: cell for cell in (
    _improved("linear1000", "T = 1000, linear, L_simple", 3.73, 3.29),
    _improved("linear", "T = 4000, linear, L_simple", 3.37, 2.90),
    _improved("linear_hybrid", "T = 4000, linear, L_hybrid", 3.26, 3.07),
    _improved("cosine", "T = 4000, cosine, L_simple", 3.26, 3.05),
    _improved("cosine_hybrid", "T = 4000, cosine, L_hybrid", 3.17, 3.19),
    _improved("cosine_vlb", "T = 4000, cosine, L_vlb", 2.94, 11.47),
)}

def _chain(title, fids, **sampler):
    """Bands of 5 %, and 0.15 at least, round what was published: two groups that evaluate the same
    weights differ by 1 to 3 %."""
    bands = {}
    for calls, values in fids.items():
        room = max(0.05 * max(values), 0.15)
        bands[calls] = (round(min(values) - room, 4), round(max(values) + room, 4))
    return Chain(title, sampler, fids, bands)


def _unpublished(title, **sampler):
    """A sampler with no FID published on these weights: it has to be as good as DPM-Solver-2."""
    return Chain(title, sampler, {20: (), 50: ()}, {20: (0.0, 4.15), 50: (3.4, 3.7)})


# Up to 100 network calls. Song et al. 2020 (DDIM), Table 1; second numbers, and DPM-Solver's, are
# those of Li et al. (SciRE-Solver), Table 1. x_0 unclipped but in the first row. quad starts at
# t = 800, logsnr at 999: so they converge to other values, 4.0 and 3.45.
_DDIM = dict(name="ddim", nodes="quad", clip_denoised=False)
CHAINS = (
    _chain("DDPM, fixed large variance",
           {10: (367.43,), 12: (246.3,), 15: (197.6,), 20: (133.37, 137.3), 50: (32.72, 32.6),
            100: (9.99,)}, name="ancestral", nodes="quad"),
    _chain("DDIM, eta 1", {10: (41.07,), 20: (18.36,), 50: (8.01,), 100: (5.78,)}, **_DDIM,
           eta=1.0),
    _chain("DDIM, eta 0.5", {10: (16.66,), 20: (8.35,), 50: (5.25,), 100: (4.46,)}, **_DDIM,
           eta=0.5),
    _chain("DDIM, eta 0.2", {10: (14.04,), 20: (7.11,), 50: (4.77,), 100: (4.25,)}, **_DDIM,
           eta=0.2),
    _chain("DDIM", {10: (13.36,), 12: (11.02,), 15: (8.92,), 20: (6.84, 6.94), 50: (4.67, 4.73),
                    100: (4.16,)}, **_DDIM, eta=0.0),
    _chain("DPM-Solver-2", {12: (6.15,), 15: (5.23,), 20: (3.95,), 50: (3.50,)},
           name="dpm_solver_2", nodes="logsnr"),
    _chain("DPM-Solver-3", {12: (8.20,), 15: (5.21,), 20: (3.81,), 50: (3.49,)},
           name="dpm_solver_3", nodes="logsnr"),
    _unpublished("DPM-Solver++ 2M", name="dpmpp_2m", nodes="logsnr"),
    _unpublished("DPM-Solver++ 3M", name="dpmpp_3m", nodes="logsnr"),
    _unpublished("UniPC-2", name="unipc_2", nodes="logsnr"),
)

# Table 4, CIFAR-10 test: reverse steps, rate in bits/dim, RMSE in [0,255].
TABLE_4 = (
    (1000, 1.77581, 0.95136), (900, 0.11994, 12.02277), (800, 0.05415, 18.47482),
    (700, 0.02866, 24.43656), (600, 0.01507, 30.80948), (500, 0.00716, 38.03236),
    (400, 0.00282, 46.12765), (300, 0.00081, 54.18826), (200, 0.00013, 60.97170),
    (100, 0.00000, 67.60125),
)

# The paper's speed on a TPU v3-8 (appendix B).
V3_8 = {32: {"steps_per_s": 21.0, "batch": 128, "sample_s": 17.0, "samples": 256},
        256: {"steps_per_s": 2.2, "batch": 64, "sample_s": 300.0, "samples": 128}}


def verdict(key, value, cell: Cell | Chain) -> str:
    """PASS or FAIL of our value against the band; '' where there is no value or no band."""
    if value is None or key not in cell.bands:
        return ""
    low, high = cell.bands[key]
    return "PASS" if low <= value <= high else "FAIL"


def rate_verdict(rate, rmse, paper_rate, paper_rmse) -> str:
    """Within 3 % of a rate above 1 bit/dim, 10 % or 0.004 of a smaller one; 3 % of the RMSE."""
    room = 0.03 * paper_rate if paper_rate > 1 else max(0.004, 0.1 * paper_rate)
    close = abs(rate - paper_rate) <= room and abs(rmse / paper_rmse - 1) <= 0.03
    return "PASS" if close else "FAIL"


def ours(document: dict, keys, counts=lambda facts: True) -> dict:
    """{key: value} of the newest step in an evaluation.json, protocol `paper`, averaged weights, of
    records whose provenance ``counts``."""
    found = {}
    for step in sorted(document, key=lambda s: int(s) if s.isdigit() else -1):
        for label, record in sorted(document[step].get("paper", {}).items()):
            values, facts = record["values"], record["provenance"]
            if not (label.startswith("ema") and counts(facts)):
                continue
            split = facts.get("reference", {}).get("split")
            renamed = dict(values)
            if "fid" in values:
                renamed[f"fid_{split or 'foreign'}"] = values["fid"]
            if "is_openai10" in values:
                renamed["is"] = values["is_openai10"]
            found |= {k: v for k, v in renamed.items() if k in keys} | {"step": int(step)}
    return found
