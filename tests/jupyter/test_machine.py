"""What a kernel tells the side panel."""

import base64
import json

import lora_nb as ln
from lora_nb.jupyter.machine import state
from lora_nb.training.run import Run
from tests.text import byte_llama, byte_tokenizer


def told():
    return json.loads(base64.b64decode(state()))


def test_memory_is_a_share_of_what_there_is():
    memory = [m for m in told()["machine"] if m["name"] == "memory"]
    assert all(0 < m["free"] < m["total"] for m in memory)


def test_runs_that_are_held_are_told_and_others_are_not():
    run = Run("\u202e<b>tone", ln.TrainConfig(max_steps=3), losses=[2.0, float("nan")], stopped_by="interrupt")
    mine = {"adapter": "\u202e<b>tone", "state": "stopped by interrupt", "steps": 2, "loss": None}
    assert mine in told()["runs"]
    del run
    assert mine not in told()["runs"]


def test_a_run_goes_on_while_its_loop_is_at_work():
    model, tokenizer = byte_llama(), byte_tokenizer()
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6))
    seen = []

    def look(_step):
        seen.append(next(run["state"] for run in told()["runs"] if run["adapter"] == "default"))

    run = ln.train(model, tokenizer, ln.dataset([("ab", "ba")] * 4), ln.TrainConfig(max_steps=2, batch_size=2), callbacks=[look])
    assert seen == ["running"] * 2
    assert told()["runs"][0]["state"] == f"stopped by {run.stopped_by}"
