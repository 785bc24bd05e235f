import json
import subprocess
import sys

import pytest

from earlybird import __version__
from earlybird.cli import main
from earlybird.data.catalogue import CATALOGUE
from earlybird.errors import InputError, Interrupted
from earlybird.train import run as run_module
from earlybird.train.recipe import keys

COMMANDS = ("train", "compare", "resume", "report", "export", "methods", "data")
SMALL = ["--data", "digits", "--width", "0.25", "--exact", "--quiet"]


def run(*words):
    return main([str(word) for word in words])


def complaint(capsys):
    """Return the one line on standard error."""
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, made through the command line."""
    folder = tmp_path_factory.mktemp("runs") / "ticket"
    assert run("train", *SMALL, "--epochs", "2", "--out", folder) == 0
    return folder


@pytest.mark.parametrize("words", [["--help"], [], ["--version"], ["methods"], ["data"], ["report", "--help"]])
def test_what_needs_no_torch_does_not_load_it(words):
    code = (
        "import sys; from earlybird.cli import main\n"
        f"assert main({words}) == 0\n"
        "slow = [name for name in ('torch', 'plotly', 'numpy') if name in sys.modules]\n"
        "sys.exit(f'loaded {slow}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_import_of_the_package_loads_no_torch():
    subprocess.run([sys.executable, "-c", "import earlybird, sys; assert 'torch' not in sys.modules"], check=True)


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"earlybird {__version__}\n"


def test_help_names_every_command(capsys):
    assert run() == 0
    printed = capsys.readouterr().out
    assert [command for command in COMMANDS if f"\n  {command} " not in printed] == []


@pytest.mark.parametrize("command", COMMANDS[:5])
def test_help_of_a_command_has_examples(command, capsys):
    assert run(command, "--help") == 0
    assert f"earlybird {command}" in capsys.readouterr().out.partition("Example")[2]


@pytest.mark.parametrize(("command", "without"), [("train", set()), ("compare", {"seed", "dense"})])
def test_every_key_of_a_recipe_is_a_flag(command, without, capsys):
    assert run(command, "--help") == 0
    words = capsys.readouterr().out.split()
    assert [key.name for key in keys() if f"--{key.name.replace('_', '-')}" not in words] == sorted(
        without, key=[key.name for key in keys()].index
    )


def test_flags_win_over_the_recipe(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('data = "digits"\nkeep = 0.5\nepochs = 3\n')
    seen = []
    monkeypatch.setattr(
        run_module, "train", lambda settings, **_: seen.append(settings.values()) or pytest.skip.Exception
    )
    monkeypatch.setattr("earlybird.cli._print_result", lambda result: None)
    words = ("--keep", "0.3,0.6", "--no-tune", "--look-every", "3it", "--lr-warmup", "none", "--round-to", "4")
    assert run("train", recipe, *words) == 0
    expected = {"keep": (0.3, 0.6), "epochs": 3, "tune": False, "lr_warmup": None, "round_to": 4}
    assert {name: seen[0][name] for name in expected} == expected
    assert str(seen[0]["look_every"]) == "3it"
    two = ("early_bird", "progressive_resizing")
    for words in (("--method", ",".join(two)), ("--method", two[0], "--method", two[1])):
        assert run("train", recipe, *words) == 0
        assert seen[-1]["method"] == two


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["trian"], "train"),
        (["train", "--keeep", "0.5"], "did you mean '--keep'?"),
        (["train", "--keep"], "--keep"),
        (["train", "--keep", "0"], "keep"),
        (["train", "--keep", "1.5"], "keep"),
        (["train", "--keep", "nan"], "keep"),
        (["train", "--keep", "half"], "keep"),
        (["train", "--epochs", "0"], "epochs"),
        (["train", "--look-every", "3"], "unit"),
        (["train", "--optimizer", "sdg"], "optimizer"),
        (["train", "--method", "early"], "early_bird"),
        (["train", "--initial-scale", "0.5"], "progressive_resizing,early_bird"),
        (["train", "--data", "cifar"], "cifar10"),
        (["train", "--data", "digits", "--model", "vgg61"], "vgg16"),
        (["train", "nothing.toml"], "nothing.toml"),
        (["train", "unknown.toml"], "did you mean 'epochs'?"),
        (["train", "broken.toml"], "TOML"),
        (["compare", "--seeds", "0"], "--seeds"),
        (["compare", "--contenders", "dence"], "dence"),
        (["compare", "--methods", ","], "names no method"),
        (["train", "--method", "iterativ", "--keep-weights", "0.5"], "did you mean 'iterative'?"),
        (["train", "--method", ","], "unknown method ''"),
        (["compare", "--keep", "1"], "keep"),
        (["resume", "nothing"], "nothing"),
        (["report"], "RUN"),
        (["report", "nothing"], "nothing"),
        (["export", "nothing"], "--onnx"),
        (["methods", "--measure", "resnet21"], "resnet20"),
        (["methods", "--measure", "small_cnn", "--keep", "2"], "keep"),
        (["export", "nothing", "--onnx", "x.onnx"], "nothing"),
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_line_with_exit_code_2_and_leaves_nothing(words, found, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unknown.toml").write_text("epochen = 3\n")
    (tmp_path / "broken.toml").write_text("epochs =\n")
    before = sorted(tmp_path.rglob("*"))
    assert run(*words) == 2
    assert found in complaint(capsys)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path not in before] == []


def test_ctrl_c_outside_training_does_not_claim_to_be_resumable(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "train", stop)
    assert run("train") == 130
    assert complaint(capsys) == "error: interrupted; type the same command again\n"


def test_an_interrupted_run_says_how_to_go_on(monkeypatch, capsys):
    def stop(*_, **__):
        raise Interrupted("stopped", hint="go on with: earlybird resume runs/x")

    monkeypatch.setattr(run_module, "train", stop)
    assert run("train") == 3
    assert "earlybird resume runs/x" in complaint(capsys)


def test_a_message_of_several_lines_is_printed_on_one(monkeypatch, capsys):
    def fail(*_, **__):
        raise InputError("first\nsecond")

    monkeypatch.setattr(run_module, "train", fail)
    assert run("train") == 2
    assert complaint(capsys) == "error: first second\n"


def test_our_own_failure_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("ours")

    monkeypatch.setattr(run_module, "train", fail)
    with pytest.raises(RuntimeError, match="ours"):
        run("train")


def test_train_prints_the_bill_and_what_is_next(tmp_path, capsys):
    folder = tmp_path / "dense"
    assert run("train", *SMALL, "--epochs", "1", "--dense", "--out", folder) == 0
    printed = capsys.readouterr().out
    assert "Training bill" in printed
    assert "accuracy" in printed
    assert f"earlybird report {folder}" in printed
    assert not (folder / "ticket.safetensors").exists()


def test_a_run_is_not_written_over(trained, capsys):
    before = (trained / "result.json").read_bytes()
    assert run("train", *SMALL, "--epochs", "1", "--out", trained) == 2
    assert "choose another --out" in complaint(capsys)
    assert (trained / "result.json").read_bytes() == before


def test_resume_of_a_finished_run_prints_its_result(trained, capsys):
    assert run("resume", trained, "--quiet") == 0
    result = json.loads((trained / "result.json").read_text())
    assert f"accuracy {result['accuracy']:.2%}" in capsys.readouterr().out


def test_report_of_a_real_run(trained, tmp_path, capsys):
    assert run("report", trained) == 0
    assert capsys.readouterr().out == f"report: {trained / 'report.html'}\n"
    html = (trained / "report.html").read_text(encoding="utf-8")
    for part in ("bill", "accuracy", "distances", "channels", "tuned", "environment"):
        assert f'<section id="{part}">' in html


def test_inference_of_a_real_run_is_timed(trained, capsys):
    assert run("export", trained, "--time", "--batch", "2", "--threads", "1") == 0
    out = capsys.readouterr().out
    assert out.startswith("inference of 2 images, 1 thread, float32")
    assert "of dense in the same turn" in out


def test_export_of_a_real_run(trained, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    onnx, weights = tmp_path / "model.onnx", tmp_path / "model.safetensors"
    assert run("export", trained, "--onnx", onnx, "--weights", weights) == 0
    assert onnx.exists()
    assert weights.exists()
    assert "largest difference" in capsys.readouterr().out
    weights.write_text("something else")
    assert run("export", trained, "--weights", weights) == 2
    assert "--force" in capsys.readouterr().err
    assert run("export", trained, "--weights", weights, "--force") == 0
    assert run("export", weights, "--weights", weights, "--model", "other:build") == 2
    assert "not from other:build" in capsys.readouterr().err


def test_compare_prints_one_bill_and_the_verdict_and_reports(tmp_path, capsys):
    folder = tmp_path / "comparison"
    assert run("compare", *SMALL, "--epochs", "2", "--seeds", "1", "--out", folder) == 0
    printed = capsys.readouterr().out
    assert "Training bill of ticket-seed0" in printed
    assert "against dense" in printed
    assert "estimate from" not in printed  # dense was run, so nothing is estimated
    assert json.loads((folder / "comparison.json").read_text())["verdict"] in printed
    assert run("report", folder) == 0
    assert '<section id="contenders">' in (folder / "report.html").read_text(encoding="utf-8")


def test_methods_measures_on_this_device(capsys):
    assert run("methods", "--measure", "small_cnn", "--keep", "0.25") == 0
    measured = capsys.readouterr().out.partition("On this device: ")[2]
    assert measured.startswith("small_cnn at keep 0.25")
    assert "(measured)" in measured
    assert "fewer MACs (counted)" in measured


def test_methods_and_data_are_listed_with_their_sources(capsys):
    assert run("methods") == 0
    printed = capsys.readouterr().out
    assert "early_bird" in printed
    assert "1909.11957" in printed
    assert "On this device" in printed
    assert run("data") == 0
    printed = capsys.readouterr().out
    assert [name for name in CATALOGUE if f"{name}\n" not in printed] == []
    assert "50,000 training and 10,000 test images, 10 classes; download 162 MiB" in printed
    assert max(map(len, printed.splitlines())) <= 110
