import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ht_export.bench.cli import SUBCOMMANDS, main
from ht_export.bench.conditions import without_folders
from runtime import GenerationResult, Generator

SHORT = ["--max-new-tokens", "12", "--repeats", "2", "--threads", "1", "--quiet"]
ROOT = Path(__file__).parents[3]

Generate = Callable[..., GenerationResult]


@pytest.fixture
def command(tiny_engine: Path, prompts_file: Path) -> list[str]:
    return ["run", str(tiny_engine), "--prompts", str(prompts_file), *SHORT]


def change_generate(monkeypatch: pytest.MonkeyPatch, change: Callable[[Generate], Generate]) -> None:
    monkeypatch.setattr(Generator, "generate", change(Generator.generate))


def interrupted_after(count: int) -> Callable[[Generate], Generate]:
    def change(generate: Generate) -> Generate:
        left = [None] * count

        def until(*arguments: Any, **options: Any) -> GenerationResult:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return generate(*arguments, **options)

        return until

    return change


def test_everything_is_measured_in_one_run(
    command: list[str],
    tiny_engine: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, plots = tmp_path / "new" / "results.json", tmp_path / "plots"
    more = ["--prompt-lookup", "--without-ngrams", "--compare", f"again={tiny_engine}", "--json", str(out)]
    assert main([*command, "--model", str(tiny_checkpoint), "--count", "2", "--plots", str(plots), *more]) == 0
    printed = capsys.readouterr().out
    for text in ("| **overall**", "| a ", "again", "without n-grams", "Slowest prompt: p", "2 of 2 texts are that"):
        assert text in printed
    assert str(tmp_path) not in out.read_text()
    found = json.loads(out.read_text())
    assert found["complete"]
    ways = {"plain", "speculative", "without_ngrams", "again", "transformers", "prompt_lookup"}
    for group in (found["overall"], *found["tasks"].values()):
        assert group["ways"].keys() == ways
        for name in (
            "speedup",
            "decode_speedup",
            "tokens_per_step",
            "plain_tokens_per_second",
            "tokens_per_second",
            "transformers_tokens_per_second",
            "tokens_per_step_without_ngrams",
        ):
            assert group[name] > 0
    assert {name: check["identical"] for name, check in found["checks"].items()} == dict.fromkeys(ways, 2)
    assert found["conditions"]["engine"]["tree"]["adaptive"]
    assert found["conditions"]["compared"]["again"] == found["conditions"]["engine"]
    assert found["tasks"].keys() == {"a", "b"}
    assert [row["id"] for row in found["rows"]] == ["p0", "p3"]
    assert len(found["rows"][0]["ways"]["speculative"]["tokens_per_second"]) == 2
    assert sorted(path.name for path in plots.iterdir()) == ["acceptance.png", "speedup.png", "tokens_per_step.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots.iterdir())


def test_conditions_are_what_is_needed_to_judge_and_to_repeat(
    command: list[str], tmp_path: Path, tiny_engine: Path, prompts_file: Path
) -> None:
    out = tmp_path / "results.json"
    trees = ["--tree-rows", "3", "--pseudo-rows", "3,1,0"]
    assert main([*command, "--no-transformers", "--count", "1", "--json", str(out), *trees]) == 0
    conditions = json.loads(out.read_text())["conditions"]
    assert conditions["command"] == (
        "ht-bench run engine.onnx --prompts prompts.jsonl --max-new-tokens 12 --repeats 2 --threads 1 --quiet "
        "--no-transformers --count 1 --json results.json --tree-rows 3 --pseudo-rows 3,1,0"
    )
    assert conditions["device"].endswith(", 1 threads")
    assert conditions["prompts"]["file"] == "prompts.jsonl"
    assert conditions["prompts"]["count"] == 1
    assert conditions["engine"]["file"] == "engine.onnx"
    assert conditions["engine"]["tree"] == {"adaptive": False, "tree_rows": 3, "pseudo_rows": [3, 1, 0]}
    assert conditions["sampling"]["temperature"] == 0.0
    assert conditions["transformers"] is None
    assert {"python", "hidden-transfer", "numpy", "onnxruntime"} <= conditions["versions"].keys()
    assert "torch" not in conditions["versions"]


def test_a_sampled_prompt_is_run_with_every_seed_and_transformers_is_not_compared(
    command: list[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    sampling = ["--temperature", "0.9", "--top-p", "0.95", "--seed", "7", "--seeds", "2"]
    model = ["--model", str(tiny_checkpoint), "--warm-up", "0"]
    assert main([*command, *model, "--count", "2", "--json", str(out), *sampling]) == 0
    found = json.loads(out.read_text())
    assert [(row["id"], row["seed"]) for row in found["rows"]] == [("p0", 7), ("p0", 8), ("p3", 7), ("p3", 8)]
    assert found["overall"]["prompts"] == 2
    assert found["conditions"]["sampling"]["seeds"] == [7, 8]
    assert {name: check["identical"] for name, check in found["checks"].items()} == {"plain": 4, "speculative": 4}


def other_text(generate: Generate) -> Generate:
    """Return a `generate` whose speculative answers have another token 5 than plain ones."""

    def changed(*arguments: Any, **options: Any) -> GenerationResult:
        result = generate(*arguments, **options)
        if options.get("speculate", True):
            result = replace(result, tokens=[*result.tokens[:5], result.tokens[5] ^ 1, *result.tokens[6:]])
        return result

    return changed


def test_a_wrong_text_is_reported_and_the_exit_status_is_1(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change_generate(monkeypatch, other_text)
    out = tmp_path / "results.json"
    arguments = [*command, "--no-transformers", "--count", "2", "--json", str(out)]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "0 of 2 texts are that of plain decoding; **2 wrong**" in captured.out
    assert "p0: differs at new token 5 (gap " in captured.out
    assert captured.err == "ht-bench: 2 texts are wrong: see above\n"
    check = json.loads(out.read_text())["checks"]["speculative"]
    assert check["wrong"] == 2
    assert check["differences"][0]["gap"] > 1e-4
    # Nor does it become right by being read from the file.
    assert main(arguments) == 1


def test_of_a_quantised_engine_agreement_is_reported(
    command: list[str], engine_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change_generate(monkeypatch, other_text)
    description = engine_copy.with_suffix(".json")
    description.write_text(json.dumps({**json.loads(description.read_text()), "precision": "int8"}))
    command[1] = str(engine_copy)
    assert main([*command, "--no-transformers", "--count", "2"]) == 0
    printed = capsys.readouterr().out
    assert "0 of 2 texts are that of plain decoding\n" in printed
    assert "; allowed)" in printed


def test_an_interrupted_run_goes_on_where_it_was(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    arguments = [*command, "--no-transformers", "--count", "3", "--warm-up", "0", "--json", str(out)]
    with monkeypatch.context() as patch:
        # Two ways, twice: during the third prompt.
        change_generate(patch, interrupted_after(9))
        assert main(arguments) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    begun = json.loads(out.read_text())
    assert not begun["complete"]
    assert begun["overall"]["prompts"] == 2
    with monkeypatch.context() as patch:
        change_generate(patch, interrupted_after(4))
        assert main(arguments) == 0
    whole = json.loads(out.read_text())
    assert whole["complete"]
    assert whole["rows"][:2] == begun["rows"]
    assert len(whole["rows"]) == 3
    first = capsys.readouterr().out
    with monkeypatch.context() as patch:
        change_generate(patch, interrupted_after(0))
        assert main(arguments) == 0
    assert capsys.readouterr().out == first


def test_other_conditions_are_named(
    command: list[str], tmp_path: Path, engine_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    command += ["--no-transformers", "--count", "1", "--json", str(out)]
    assert main(command) == 0
    before = out.read_bytes()
    assert main([*command, "--max-new-tokens", "13", "--seed", "0", "--temperature", "1"]) == 1
    assert "; sampling.temperature is 0.0 there and 1.0 now; " in (said := capsys.readouterr().err)
    assert f"{out} holds results under other conditions: max_new_tokens is 12 there and 13 now" in said
    assert said.endswith("repeat the earlier command to continue it, or choose another --json\n")
    description = engine_copy.with_suffix(".json")
    description.write_text(description.read_text() + "\n")
    command[1] = str(engine_copy)
    assert main(command) == 1
    assert "conditions: engine.description_sha256 is '" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_the_times_that_sizes_adapt_to_are_a_condition(
    command: list[str], engine_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = engine_copy.with_suffix(".tuning.json")
    # Another test may have measured the engine.
    tuning.unlink(missing_ok=True)
    command[1] = str(engine_copy)
    command += ["--no-transformers", "--count", "1", "--json", str(tmp_path / "results.json")]
    assert main(["tune", str(engine_copy), "--repeats", "1", "--threads", "1", "--quiet"]) == 0
    assert [main(command), main(command)] == [0, 0]
    entry = json.loads(tuning.read_text())["tunings"][0]
    tuning.write_text(json.dumps({**json.loads(tuning.read_text()), "tunings": [{**entry, "rate": 1.75}]}))
    assert main(command) == 1
    assert "conditions: engine.tree.menu_sha256 is '" in capsys.readouterr().err.splitlines()[-1]


def test_another_day_and_commit_continue_and_are_told(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command += ["--no-transformers", "--count", "2", "--json", str(out)]
    assert main(command) == 0
    found = json.loads(out.read_text())
    now = {key: found["conditions"][key] for key in ("date", "commit")}
    found["conditions"] |= {"date": "2026-01-01", "commit": "abc"}
    out.write_text(json.dumps({**found, "rows": found["rows"][:1]}))
    assert main(command) == 0
    conditions = json.loads(out.read_text())["conditions"]
    assert (conditions["date"], conditions["commit"]) == ("2026-01-01", "abc")
    assert conditions["continued"] == [now]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "is not a valid file of results of ht-bench run (Expecting property name"),
        ("[]", "is not a valid file of results of ht-bench run (Expected `object`"),
        ('{"format": "other", "version": 1, "conditions": {}, "rows": []}', "at `$.format`, which is 'other'"),
        (
            '{"format": "ht-bench", "version": 2}',
            "is of version 2; this release reads version 1: update hidden-transfer",
        ),
        ('{"format": "ht-bench", "version": 1}', "missing required field `conditions`"),
        ('{"format": "ht-bench", "version": 1, "conditions": ' + "[" * 9999, "nested too deeply"),
        (
            '{"format": "ht-bench", "version": 1, "conditions": {"continued": 1}, "rows": []}',
            "misstate the runs that continued it",
        ),
    ],
)
def test_a_file_of_something_else_is_not_overwritten(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: str, message: str
) -> None:
    out = tmp_path / "results.json"
    out.write_text(contents)
    assert main([*command, "--no-transformers", "--json", str(out)]) == 1
    assert message in capsys.readouterr().err
    assert out.read_text() == contents


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["rows"][0].pop("ways"), "missing required field `ways` - at `$.rows[0]`"),
        (lambda found: found["rows"][0]["ways"].pop("plain"), "lacks plain or speculative decoding"),
        (lambda found: found["rows"][0]["ways"]["plain"].update(steps=[1, 2, 3]), "not one number for each repeat"),
        (lambda found: found["rows"][0]["ways"]["plain"].update(steps=["1"]), "Expected `int`, got `str`"),
        (lambda found: found["rows"][0]["ways"]["plain"].update(tokens_per_second=[0]), "Expected `float` > 0.0"),
        (lambda found: found["rows"][0]["ways"]["plain"].update(tokens_per_second=[10**400]), "out of range"),
        (lambda found: found["rows"][0].update(seed=[1]), "`$.rows[0].seed`"),
        (lambda found: found["rows"][0].update(id="other"), "its prompts are not those asked for"),
    ],
)
def test_damaged_rows_are_not_continued(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable, message: str
) -> None:
    out = tmp_path / "results.json"
    command += ["--no-transformers", "--count", "1", "--json", str(out)]
    assert main(command) == 0
    found = json.loads(out.read_text())
    change(found)
    out.write_text(json.dumps(found))
    assert main(command) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--count 0", "--count must be at least 1, not 0"),
        ("--max-new-tokens 0", "--max-new-tokens must be at least 1, not 0"),
        ("--repeats 0", "--repeats must be at least 1, not 0"),
        ("--warm-up -1", "--warm-up must be at least 0, not -1"),
        ("--threads 0", "--threads must be at least 1, not 0"),
        ("--tasks a,c", "no prompt of task 'c' in PROMPTS; it has: , a, b"),
        ("--prompts nowhere.jsonl", "no prompts file at nowhere.jsonl"),
        ("--temperature -1", "temperature must be from 0 to 100, not -1"),
        ("--top-p 0.5", "top_p has no meaning with temperature 0"),
        ("--temperature 1 --top-k 0", "top_k must be at least 1, not 0"),
        ("--temperature 1 --min-p 2", "min_p must be from 0 to 1, not 2"),
        ("--repetition-penalty 0", "repetition_penalty must be from 0.01 to 100, not 0"),
        ("--seed 1", "--seed and --seeds have no meaning without --temperature above 0"),
        ("--temperature 1 --seeds 0", "--seeds must be at least 1, not 0"),
        ("--temperature 1 --seed -1", "--seed -1 and the 3 from it on must be 0 to 2**64 - 1"),
        ("--tree-rows 4", "--tree-rows and --pseudo-rows go together"),
        ("--tree-rows 4 --pseudo-rows 4,2", "pseudo_rows must be 3 numbers"),
        ("--compare other=nowhere.onnx", "no engine at nowhere.onnx"),
        ("--compare plain=ENGINE", "--compare plain=...: a name must be"),
        ("--compare x=ENGINE --compare x=ENGINE", "given once"),
        ("--compare x=COPY", "--compare x: that engine has another base model (tiny"),
        ("--prompt-lookup", "--prompt-lookup is that of transformers"),
        ("--json FOLDER", "FOLDER is a folder; give the name of a file"),
        ("--json PROMPTS/results.json", "cannot write PROMPTS/results.json"),
        ("--plots PROMPTS", "cannot write PROMPTS/speedup.png"),
        ("--prompts LONG", "prompt 1: the prompt has 1"),
    ],
)
def test_a_mistake_is_one_line(
    command: list[str],
    tiny_engine: Path,
    engine_copy: Path,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "y" * 1000}))
    description = engine_copy.with_suffix(".json")
    about = json.loads(description.read_text())
    about["base_model"]["weights_sha256"] = "0" * 64
    description.write_text(json.dumps(about))
    places = {"ENGINE": tiny_engine, "COPY": engine_copy, "PROMPTS": prompts_file, "FOLDER": tmp_path}
    for name, path in {**places, "LONG": tmp_path / "long.jsonl"}.items():
        more, message = more.replace(name, str(path)), message.replace(name, str(path))
    assert main([*command, "--no-transformers", *more.split()]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ht-bench: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--compare medusa.onnx", "'medusa.onnx' is not a name and an engine such as medusa=medusa.onnx"),
        ("--pseudo-rows x", "'x' is not a list of whole numbers"),
        ("--model m --no-transformers", "not allowed with argument"),
    ],
)
def test_an_option_that_cannot_be_read(
    command: list[str], capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        main([*command, *more.split()])
    assert message in capsys.readouterr().err


def test_the_runtime_alone_is_enough_without_transformers(command: list[str], tmp_path: Path) -> None:
    """As in an environment without them: importing one of these would fail."""
    absent = ("torch", "transformers", "rich", "matplotlib", "onnx", "safetensors")
    code = (
        "import importlib.util, sys\n"
        f"absent = {absent}\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name in absent else find_spec(name, *more)\n"
        "sys.modules |= dict.fromkeys(absent)\n"
        "from ht_export.bench.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [argument for argument in command if argument != "--quiet"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, "-c", code, *arguments, "--count", "1", *more]
        return subprocess.run(whole, capture_output=True, text=True, check=False, cwd=ROOT)

    done = run("--no-transformers", "--json", str(tmp_path / "results.json"))
    assert (done.returncode, done.stderr) == (0, "measuring answers; with rich installed there is a bar\n")
    assert "| **overall** |" in done.stdout
    assert "comparing with transformers needs torch and transformers; install" in run().stderr
    assert "--plots needs matplotlib; install" in run("--no-transformers", "--plots", str(tmp_path)).stderr


def test_help_is_quick() -> None:
    """No subcommand is imported for it, and nothing that takes long."""
    code = (
        "import sys\n"
        "from ht_export.bench.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.endswith("\n[]\n")
    assert all(f"\n    {name}" in done.stdout for name in SUBCOMMANDS)


@pytest.mark.parametrize("name", list(SUBCOMMANDS))
def test_every_subcommand_says_what_it_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: ht-bench {name} ")
    assert f"ht-bench {name} " in said.split("]", 1)[1]


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("/home/me/engine.onnx", "engine.onnx"),
        ("medusa=/home/me/medusa.onnx", "medusa=medusa.onnx"),
        ("--json=/tmp/results.json", "--json=results.json"),
        ("../folder/engine.onnx", "engine.onnx"),
        ("owner/model", "owner/model"),
        ("3,1,0", "3,1,0"),
    ],
)
def test_a_command_is_shown_without_the_machines_folders(argument: str, shown: str) -> None:
    assert without_folders(argument) == shown
