"""What identifies a model, in dumps and in anchors.json."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anchorscope.models import model_facts

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZE, num_attention_heads=4, num_key_value_heads=2, **changes)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # fresh norms are all one; a trained model's are not
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    return model


def test_shapes_and_names():
    facts = model_facts(llama(max_position_embeddings=99), "mine", "r1")
    assert facts["name"] == "mine"
    assert facts["revision"] == "r1"
    assert (facts["type"], facts["layers"], facts["query_heads"], facts["kv_heads"]) == ("llama", 2, 4, 2)
    assert (facts["head_dim"], facts["positions"]) == (8, 99)
    assert model_facts(llama())["name"] == "LlamaForCausalLM"


def test_fingerprint_survives_dtypes_and_tells_weights_apart():
    model = llama().to(torch.bfloat16)
    own = model_facts(model)["fingerprint"]
    assert model_facts(model.float())["fingerprint"] == own
    assert model_facts(model.double())["fingerprint"] == own
    assert model_facts(llama(seed=1))["fingerprint"] != own
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    assert model_facts(model)["fingerprint"] != own
