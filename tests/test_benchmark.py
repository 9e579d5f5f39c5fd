"""The benchmark in its small form: it measures what it says, and writes it down."""

import json
import sys
import time
from pathlib import Path

import pytest
from conftest import make_args, make_lora, make_model, make_rows, make_tokenizer
from transformers import TrainerCallback

from hf_fedsa import FederatedTrainer

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import benchmark


@pytest.fixture
def model_dir(tmp_path):
    make_model(max_position_embeddings=512).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_everything_is_measured_and_written(model_dir, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_rows(40, seed=0, max_words=30)["text"]))
    arguments = (
        f"--model {model_dir} --precisions fp32 --tokens 8 --batch_sizes 2 --clients 3 --steps 3 --repeats 2 "
        f"--side_by_side 2 --rows {rows} --output {tmp_path}/out/report.json --plot {tmp_path}/out/report.png"
    )
    report = benchmark.main(benchmark.make_parser().parse_args(arguments.split()))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")

    [steps] = report["steps"]
    assert {name: len(way["seconds"]) for name, way in steps["ways"].items()} == {
        "side_by_side": 2 * 3,  # The second round of each turn.
        "one_by_one": 2 * 3,
        "rebuilt": 2 * 2,  # Each trainer's first step warms up, and so do those of the other two.
        "sft": 2 * 2,
        "torch": 2 * 2,
    }
    for way in steps["ways"].values():
        assert 0 < way["min"] <= way["median"] <= way["max"]
        assert way["round"] == pytest.approx(10 * way["median"] + (way["between_steps_of_a_round"] or 0))
    ours, floor, rebuilt = (steps["ways"][name] for name in ("side_by_side", "torch", "rebuilt"))
    assert steps["side_by_side_over_torch"] == pytest.approx(ours["median"] / floor["median"])
    assert steps["rebuilt_over_side_by_side"] == pytest.approx(rebuilt["round"] / ours["round"])
    assert steps["rebuilt_over_side_by_side"] > 1.3, "building three trainers takes longer than steps of a tiny model"

    [scaling] = report["scaling"]
    assert scaling["tokens_per_second"] > 0 and scaling["torch_tokens_per_second"] > 0
    assert 2**26 < scaling["torch_peak_bytes"] < 2**34 and 2**26 < scaling["peak_bytes"] < 2**34

    [padding] = report["padding"]
    assert padding["rows"] == 40
    assert padding["real_tokens"] == sum(len(text.split()) + 1 for text in make_rows(40, seed=0, max_words=30)["text"])
    assert 1 < padding["one_by_one_over_real"] < 3 and 1 <= padding["side_by_side_over_one_by_one"] < 1.3


def test_what_callbacks_take_is_no_part_of_a_step(tmp_path, tokenizer):
    class Sleep(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            time.sleep(0.2)

        on_step_end = on_step_begin

    trainer = FederatedTrainer(
        model=make_model(),
        args=make_args(tmp_path, num_rounds=1),
        train_dataset={"a": make_rows(4, seed=0), "b": make_rows(4, seed=1)},
        processing_class=tokenizer,
        peft_config=make_lora(),
        callbacks=[Sleep()],
    )
    watch = benchmark.Stopwatch.on(trainer)
    trainer.train()
    assert len(watch.steps) == len(watch.boundaries) == 3
    assert all(seconds >= 0.4 for seconds in watch.boundaries)
    assert all(0 < seconds < 0.4 for seconds in watch.steps[1:])


def test_a_single_step_is_refused():
    with pytest.raises(ValueError, match="`--steps 1` leaves none to time"):
        benchmark.main(benchmark.make_parser().parse_args(["--steps", "1"]))
