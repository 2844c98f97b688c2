import pytest

from ddpm_jax.compilation import passes

LINE = ("{time} 4242 hlo_pass_pipeline.cc:176] HLO pass: {name} time: {us} us ({us} us) "
        "(cumulative: 99 ms, max: 9 ms, #called: 3)")


def log(*lines):
    """Of (microseconds at the end, name, microseconds)."""
    return "\n".join(["unrelated", *(
        LINE.format(time=f"I0000 00:00:1786848746.{end:06d}", name=name, us=us)
        for end, name, us in lines)])


def test_exclusive_seconds():
    """An outer pass of 10 ms around 2 + 3 ms, the second of which has 1 ms in it; then 4 ms."""
    found = {p.name: p for p in passes.read(log(
        (3000, "a", 2000), (6000, "inner", 1000), (7000, "b", 3000), (11000, "outer", 10000),
        (15000, "a", 4000)))}
    assert found["outer"].seconds == pytest.approx(0.005)
    assert found["b"].seconds == pytest.approx(0.002)
    assert found["a"].seconds == pytest.approx(0.006) and found["a"].runs == 2
    assert list(found)[0] == "a" and sum(p.seconds for p in found.values()) == pytest.approx(0.014)


def test_threads_do_not_nest():
    text = log((3000, "a", 2000)) + "\n" + log((4000, "b", 4000)).replace(" 4242 ", " 77 ")
    assert {p.name: round(p.seconds, 6) for p in passes.read(text)} == {"a": 0.002, "b": 0.004}


def test_the_clock_of_later_releases_and_stages():
    text = ("I1127 00:10:28.365466   24164 hlo_pass_pipeline.cc:169] HLO pass: sharding-remover "
            "time: 155 us (155 us) (cumulative: 9.82 ms, max: 9.67 ms, #called: 2)\n"
            "I1127 00:11:50.441297   25817 x.cc:6241] HLO_PASSES stage duration: 5.89106214025s\n"
            "I1127 00:12:01.484697   26481 x.cc:1488] CODE_GENERATION stage duration: 526.39ms\n"
            "I1127 00:12:01.586503   25817 x.cc:985] END_TO_END stage duration: 1m2s\n")
    assert passes.read(text) == [passes.Pass("sharding-remover", 155e-6, 1)]
    assert passes.stages(text) == pytest.approx({"HLO_PASSES": 5.89106, "CODE_GENERATION": 0.52639})
    assert passes.read("") == [] and passes.stages("") == {}
