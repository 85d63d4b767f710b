"""Contract of each private or patched API in ftray/compat: the test that fails names what a new version changed."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.job_submission import JobSubmissionClient

from ftray.compat import datasets as datasets_compat
from ftray.compat import deepspeed as deepspeed_compat
from ftray.compat import metrics as metrics_compat
from ftray.compat import peft as peft_compat
from ftray.compat import torch as torch_compat
from ftray.compat import transformers as transformers_compat
from ftray.compat.ray_jobs import cluster_version

START = """
import os, sys, tempfile
import torch.distributed as dist
if sys.argv[1] == "patched":
    from ftray.compat.deepspeed import without_compiler
    without_compiler()
import deepspeed
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
print("started")
"""


@pytest.mark.parametrize("how", ["patched", "as it is"])
def test_deepspeed_starts_on_cpu_without_a_compiler_only_when_patched(how: str, tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    done = subprocess.run(
        [sys.executable, "-c", START, how], env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    if how == "patched":
        assert done.returncode == 0, done.stderr[-2000:]
        assert "started" in done.stdout
    else:
        assert done.returncode != 0, "DeepSpeed starts without a compiler by itself: remove without_compiler"


def parameters_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_deepspeed_has_the_methods_that_sharded_state_is_read_with() -> None:
    """What they do is under test in test_engines and test_zero_init."""
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.tensor_fragment import tensor_fragment

    assert parameters_of(Init._convert_to_zero_parameters) == ["self", "param_list"]
    assert parameters_of(DeepSpeedZeroOptimizer_Stage3._get_param_partition_rank) == ["self", "param"]
    state = parameters_of(DeepSpeedZeroOptimizer_Stage3._get_fp32_opt_state_partition)
    assert {"release_swap_buffers", "optim_state_key"} < set(state)
    assert parameters_of(DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state) == ["self"]
    assert "get_hp_fragment" in vars(tensor_fragment)
    assert "lp_fragment_address" in tensor_fragment.__dataclass_fields__


def test_a_deepspeed_optimizer_that_checks_no_overflows_is_left_alone() -> None:
    checking, other = SimpleNamespace(check_grad_overflow=False), SimpleNamespace()
    for optimizer in (checking, other):
        deepspeed_compat.count_overflows(SimpleNamespace(optimizer=optimizer))
    assert checking.check_grad_overflow is True
    assert not vars(other)
    assert deepspeed_compat.fragment_span(torch.nn.Parameter(torch.ones(2))) == (0, 0)


def test_torch_takes_norms_of_16_bit_tensors_in_float32() -> None:
    tensors = [torch.full((1000,), 0.1, dtype=torch.bfloat16), torch.ones(4)]
    found = torch_compat.norms(tensors)
    assert [norm.dtype for norm in found] == [torch.float32] * 2
    assert [float(norm) for norm in found] == pytest.approx([float(t.float().norm()) for t in tensors], rel=1e-6)


def test_torch_counts_in_place_changes_of_the_tensor_that_owns_the_memory() -> None:
    owner = torch.zeros(4)
    view = owner[1:]
    before = torch_compat.version_of(view)
    assert before[0] is owner
    owner.add_(1)
    assert torch_compat.version_of(view)[1] > before[1]
    assert torch_compat.version_of(owner) == torch_compat.version_of(owner)


def test_torch_multiplies_int8_matrices() -> None:
    x, weight = (torch.randint(-9, 9, (32, 32), dtype=torch.int8) for _ in range(2))
    assert torch.equal(torch_compat.int8_product(x, weight), x.int() @ weight.int())


def test_torch_has_what_only_gpus_use() -> None:
    """Their results are under test in tests/gpu."""
    assert callable(torch._scaled_mm)
    assert callable(torch.cuda.memory._set_allocator_settings)


def test_transformers_names_the_attention_of_a_model_and_of_a_file() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=8, num_hidden_layers=1, vocab_size=8)
    assert transformers_compat.attention_in_file(settings) is None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    assert transformers_compat.attention_of(model.config) == "eager"
    model.set_attn_implementation("sdpa")
    assert transformers_compat.attention_of(model.config) == "sdpa"
    named = AutoConfig.for_model("llama", attn_implementation="org/kernel")
    assert transformers_compat.attention_in_file(named) == "org/kernel"


def test_transformers_tells_the_class_of_a_config_and_what_it_supports() -> None:
    from transformers import AutoConfig, BloomForCausalLM, LlamaForCausalLM

    support = transformers_compat.attention_support
    assert transformers_compat.causal_class(AutoConfig.for_model("llama")) is LlamaForCausalLM
    assert transformers_compat.causal_class(object()) is None
    assert support(LlamaForCausalLM) == (True, True)
    assert support(BloomForCausalLM)[0] is False
    assert support(None) == (True, True)


def test_transformers_lists_what_stays_in_float32() -> None:
    from transformers import DeepseekV3ForCausalLM, T5ForConditionalGeneration

    strict = transformers_compat.fp32_parts(DeepseekV3ForCausalLM, in_fp16=False)
    assert any("correction_bias" in part for part in strict)
    assert transformers_compat.fp32_parts(T5ForConditionalGeneration, in_fp16=False) == set()
    assert transformers_compat.fp32_parts(T5ForConditionalGeneration, in_fp16=True) == {"wo"}


def test_peft_uses_the_layers_that_are_registered() -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    class OwnLinear(Linear):
        pass

    settings = LoraConfig(target_modules=["0"])
    peft_compat.register_layers(settings, {torch.nn.Linear: OwnLinear})
    model = inject_adapter_in_model(settings, torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert type(model[0]) is OwnLinear


def test_ray_tells_free_resources_and_draining_nodes() -> None:
    """What they return is under test in tests/ray."""
    import ray
    from ray.train.torch import TorchConfig

    from ftray.compat.ray_train import TorchBackend

    assert callable(ray._private.state.available_resources_per_node)
    assert callable(ray._private.state.state.get_draining_nodes)
    assert parameters_of(TorchBackend.on_start) == ["self", "worker_group", "backend_config"]
    assert TorchConfig().backend_cls is TorchBackend


@pytest.mark.parametrize("name", ["BLEU", "CHRF"])
def test_sacrebleu_scores_a_corpus_by_the_sum_of_its_counts(name: str) -> None:
    import sacrebleu.metrics

    metric = getattr(sacrebleu.metrics, name)()
    answers = ["the cat sat on the mat", "a dog barked at the cat tonight"]
    references = ["the cat is on the mat", "the dog barked at a cat last night"]
    statistics = metrics_compat.corpus_statistics(metric, answers, references)
    summed = [sum(column) for column in zip(*statistics, strict=True)]
    assert metrics_compat.score_of(metric, summed) == pytest.approx(metric.corpus_score(answers, [references]).score)


def test_a_bert_scorer_is_given_the_models_limit() -> None:
    scorer = SimpleNamespace(_tokenizer=SimpleNamespace(model_max_length=10**30))
    metrics_compat.limit_tokens(scorer, 512)
    assert scorer._tokenizer.model_max_length == 512


def test_datasets_have_fingerprints_by_their_content() -> None:
    import datasets

    one, same, other = (datasets.Dataset.from_dict({"a": values}) for values in ([1], [1], [2]))
    assert datasets_compat.fingerprint(one) == datasets_compat.fingerprint(same) != datasets_compat.fingerprint(other)


def test_the_job_client_knows_the_version_of_its_cluster() -> None:
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"version": "4", "ray_version": "9.8.7", "ray_commit": "c", "session_name": "s"}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = JobSubmissionClient(f"http://127.0.0.1:{server.server_port}")
        assert cluster_version(client) == "9.8.7"
        server.shutdown()
