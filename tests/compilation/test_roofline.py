import pytest

from ddpm_jax.compilation import hardware, roofline
from ddpm_jax.models.unet import UNet

CIFAR = {"image_size": 32, "ch": 128, "ch_mult": (1, 2, 2, 2), "num_res_blocks": 2,
         "attn_resolutions": (16,)}
LARGE = {"image_size": 256, "ch": 128, "ch_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2,
         "attn_resolutions": (16,)}


def test_counts_of_the_papers_networks():
    # Counted by hand from the paper's Appendix B and the official code, and published: 35.7M, 114M.
    cifar = roofline.unet_work(UNet(**CIFAR))
    assert cifar.parameters == 35_746_307
    assert cifar.forward_flops / 1e9 == pytest.approx(12.44, abs=0.005)
    assert cifar.train_flops / 1e9 == pytest.approx(37.33, abs=0.005)
    large = roofline.unet_work(UNet(**LARGE))
    assert large.parameters == 113_673_219
    assert large.forward_flops / 1e9 == pytest.approx(497.0, abs=0.05)
    bedroom_large = roofline.unet_work(UNet(**{**LARGE, "ch": 192}))
    assert bedroom_large.parameters / 1e6 == pytest.approx(255.68, abs=0.005)


def test_a_one_level_network_by_hand():
    # 8x8 grey, 4 channels, one level, one block a level, attention nowhere but in the middle.
    work = roofline.unet_work(UNet(image_size=8, ch=4, ch_mult=(1,), num_res_blocks=1,
                                   attn_resolutions=(), in_channels=1, out_channels=1))
    a = 64  # pixels
    down, middle = 2 * 9 * 16 * a, 2 * 2 * 9 * 16 * a
    up = 2 * (9 * 8 * 4 + 9 * 16) * a
    assert work.conv3x3 == 9 * 4 * a + down + middle + up + 9 * 4 * a
    assert work.conv1x1 == 2 * 8 * 4 * a + 4 * 16 * a
    assert work.dense == 4 * 16 + 16 * 16 + 5 * 16 * 4
    assert work.attention == 2 * a * a * 4
    assert work.macs == work.conv3x3 + work.conv1x1 + work.dense + work.attention


def test_space_to_depth_moves_work_out_of_the_finest_level():
    plain = roofline.unet_work(UNet(**LARGE))
    folded = roofline.unet_work(
        UNet(**{**LARGE, "space_to_depth": 2, "attn_resolutions": (8,)}))
    assert folded.macs < plain.macs / 3
    # Only the first and the last convolution see other channels: 3 and 12.
    assert folded.parameters - plain.parameters == 2 * 9 * 128 * (12 - 3) + (12 - 3)


def test_the_papers_own_speed_is_20_percent_of_its_machine():
    work, v3 = roofline.unet_work(UNet(**CIFAR)), hardware.CHIPS["v3"]
    at = roofline.at_mfu(v3, devices=8, flops=128 * work.train_flops, steps=800_000, mfu=0.204)
    assert at["steps_per_s"] == pytest.approx(21, rel=0.01)
    assert at["hours"] == pytest.approx(10.6, rel=0.01)
    assert at["chip_hours"] == pytest.approx(4 * 10.6, rel=0.01)
    assert at["status"] == "estimated"


def test_bounds():
    v5e = hardware.CHIPS["v5e"]
    base = {"devices": 8, "flops": 8 * 197e12}
    one = roofline.roofline(v5e, **base)
    assert one["seconds"] == pytest.approx(1.0) and one["bound"] == "compute"
    assert one["intensity"] is None and one["mfu"] == pytest.approx(1.0)
    slow = roofline.roofline(v5e, **base, bytes_per_device=3 * 819e9)
    assert slow["bound"] == "memory" and slow["seconds"] == pytest.approx(3.0)
    assert slow["intensity"] == pytest.approx(197e12 / (3 * 819e9))
    assert slow["ridge"] == pytest.approx(240.5, abs=0.1)
    # A ring of 8 at 200 GB/s: 2 * 7/8 of the payload.
    net = roofline.roofline(v5e, **base, payload=400e9)
    assert net["all_reduce_s"] == pytest.approx(3.5) and net["bound"] == "all-reduce"
    assert net["seconds"] == pytest.approx(4.5)
    two = roofline.roofline(v5e, devices=16, slices=2, flops=1, payload=400e9)
    assert two["all_reduce_s"] == pytest.approx(3.5 + 400e9 / (8 * 3.125e9))
    assert roofline.all_reduce_seconds(hardware.CHIPS["v3"], 8, 2, 1.0) is None
    assert roofline.all_reduce_seconds(hardware.CHIPS["v3"], 1, 1, 1.0) == 0
    # v3 has two devices a chip: eight devices are a ring of four.
    v3 = roofline.roofline(hardware.CHIPS["v3"], devices=8, flops=1, payload=328e9)
    assert v3["all_reduce_s"] == pytest.approx(1.5)
