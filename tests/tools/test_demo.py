"""The command line, and that averaging wins in the demo for an honest reason."""

import numpy as np
import pytest

import fastema
from fastema import __main__ as command
from fastema import demo
from processes import output_of


def test_info_prints_the_build_configuration(capsys):
    assert command.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "instruction set" in printed
    assert "openmp" in printed


def test_the_command_line_tells_its_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--version"])
    assert capsys.readouterr().out == f"fastema {fastema.__version__}\n"


def test_demo_prints_its_table_and_writes_its_picture(tmp_path, capsys):
    picture = tmp_path / "demo.png"
    assert command.main(["demo", "--epochs", "4", "--picture", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = lines.index("held-out accuracy   raw weights   averaged weights")
    last = lines[header + 5].split()
    assert last[:2] == ["epoch", "4"]
    raw, averaged = (float(x.rstrip("%")) for x in last[2:])
    assert averaged > raw
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_says_what_to_install_where_its_packages_are_missing():
    code = """
        import sys
        sys.modules["sklearn"] = None  # as if it were not installed
        from fastema.__main__ import main
        sys.stderr = sys.stdout
        print(main(["demo"]))
    """
    assert output_of(code).endswith("brings Keras, TensorFlow, scikit-learn and matplotlib\n1")


@pytest.mark.slow
def test_averaging_wins_over_five_seeds_because_it_averages_noise():
    """It wins at every seed; its accuracy scatters less from epoch to epoch, which is what noise does."""
    scores = [demo.run(seed=seed, verbose=0)[5:] for seed in range(5)]
    raw = np.array([[score.raw for score in run] for run in scores])
    averaged = np.array([[score.averaged for score in run] for run in scores])
    for seed in range(5):
        print(
            f"seed {seed}: raw {raw[seed].mean():.3f} +- {raw[seed].std():.3f}, "
            f"averaged {averaged[seed].mean():.3f} +- {averaged[seed].std():.3f}"
        )
    assert (averaged.mean(1) > raw.mean(1)).all()
    assert (averaged > raw).mean() > 0.9
    assert (averaged.std(1) < raw.std(1)).all()


@pytest.mark.slow
def test_without_noise_there_is_little_to_average(monkeypatch):
    """With right labels and a small rate raw weights are as good: the gain was the noise's."""
    monkeypatch.setattr(demo, "WRONG_LABELS", 0.0)
    monkeypatch.setattr(demo, "LEARNING_RATE", 0.05)
    last = [demo.run(seed=seed, verbose=0)[-1] for seed in range(3)]
    gains = [score.averaged - score.raw for score in last]
    print("gains without noise:", [f"{gain:+.3f}" for gain in gains])
    assert max(gains) < 0.01
