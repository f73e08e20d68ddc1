"""Tiny random models that see or hear: their towers have layers of their own, numbered from 0 as the text's are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 6,
}
MEDIA = 90  # the token that stands for one piece of an image or a sound
Made = tuple[Any, dict[str, Any]]


def _made(config: Any, kind: Any = transformers.AutoModelForImageTextToText) -> Any:
    torch.manual_seed(7)
    model = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "head" not in name:
                weight.mul_(6)
            if "gate" in name:
                weight.fill_(0.5)  # as initialized, gates shut the tower out
    return model.eval()


def _ids(media: int, tokens: int = 60) -> torch.Tensor:
    """`media` tokens of an image or a sound after four of text, then more text."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, 80, (tokens,), generator=generator)
    return torch.cat((text[:4], torch.full((media,), MEDIA), text[4:]))[None]


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def llava() -> Made:
    """Sixteen patches by CLIP before the text of a llama."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        image_token_id=MEDIA,
    )
    return _made(config), {"input_ids": _ids(16), "pixel_values": _pixels(1, 3, 24, 24)}


def mllama() -> Made:
    """Layer 1 of the text looks at the image only (cross-attention)."""
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    vision = {
        **{k: v for k, v in TOWER.items() if k not in ("num_attention_heads", "num_hidden_layers")},
        "attention_heads": 4,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.MllamaConfig(
        vision_config=vision, text_config={**text, "rope_parameters": rope}, image_token_index=MEDIA
    )
    inputs = {
        "input_ids": _ids(1),
        "pixel_values": _pixels(1, 1, 1, 3, 24, 24),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 61, 1, 1, dtype=torch.long),
    }
    return _made(config), inputs


def _qwen(version: str) -> Made:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    if version == "3":
        rope["mrope_interleaved"] = True
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 6, "in_channels": 3}
    if version == "2":
        vision |= {"embed_dim": 32, "hidden_size": 48}
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 64}
    vision |= {"2.5": {"fullatt_block_indexes": [1], "window_size": 24}}.get(version, {})
    vision |= {"3": {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}}.get(version, {})
    tokens = {"image_token_id": MEDIA, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    kind = {"2": "Qwen2VLConfig", "2.5": "Qwen2_5_VLConfig", "3": "Qwen3VLConfig"}[version]
    model = _made(getattr(transformers, kind)(text_config=text, vision_config=vision, **tokens))
    ids = _ids(16)
    inputs = {
        "input_ids": ids,
        "pixel_values": _pixels(64, 3 * 2 * 6 * 6),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == MEDIA).long(),
    }
    return model, inputs


def gemma3() -> Made:
    """An image is seen from both sides within the causal text."""
    text = {**TEXT, "head_dim": 16, "query_pre_attn_scalar": 32, "sliding_window": 24}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**TOWER),
        mm_tokens_per_image=16,
        image_token_index=MEDIA,
        image_token_id=MEDIA,
        boi_token_index=91,
        eoi_token_index=92,
    )
    ids = _ids(16)
    return _made(config), {
        "input_ids": ids,
        "pixel_values": _pixels(1, 3, 24, 24),
        "token_type_ids": (ids == MEDIA).long(),
    }


def paligemma() -> Made:
    """The prompt is a prefix that sees itself from both sides."""
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**TEXT, head_dim=16),
        vision_config=transformers.SiglipVisionConfig(**TOWER),
        projection_dim=48,
        image_token_index=MEDIA,
        image_token_id=MEDIA,
    )
    ids = _ids(16)
    return _made(config), {"input_ids": ids, "pixel_values": _pixels(1, 3, 24, 24)}


def idefics3() -> Made:
    """Patches by its own SigLIP, four to a token."""
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=TOWER, image_token_id=MEDIA, scale_factor=2
    )
    return _made(config), {"input_ids": _ids(4), "pixel_values": _pixels(1, 1, 3, 24, 24)}


def qwen2_audio() -> Made:
    """A sound by whisper's encoder before the text."""
    audio = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "num_mel_bins": 8,
        "max_source_positions": 32,
    }
    config = transformers.Qwen2AudioConfig(
        audio_config=audio, text_config=transformers.Qwen2Config(**TEXT), audio_token_index=MEDIA, audio_token_id=MEDIA
    )
    inputs = {
        "input_ids": _ids(16),
        "input_features": _pixels(1, 8, 64),
        "feature_attention_mask": torch.ones(1, 64, dtype=torch.long),
        "attention_mask": torch.ones(1, 76, dtype=torch.long),
    }
    return _made(config, transformers.Qwen2AudioForConditionalGeneration), inputs


def gemma4() -> Made:
    """Its vision tower numbers its layers as the text does."""
    text = {
        **TEXT,
        "head_dim": 16,
        "global_head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 97,
    }
    vision = {k: v for k, v in TOWER.items() if k != "image_size"}
    vision |= {"head_dim": 8, "num_key_value_heads": 4, "pooling_kernel_size": 2, "position_embedding_size": 64}
    config = transformers.Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        image_token_id=MEDIA,
        boi_token_id=91,
        eoi_token_id=92,
    )
    ids = _ids(4)
    at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(1, 16, 2)
    inputs = {"input_ids": ids, "pixel_values": _pixels(1, 16, 3 * 36), "image_position_ids": at}
    return _made(config), {**inputs, "mm_token_type_ids": (ids == MEDIA).long()}


def voxtral_realtime() -> Made:
    """Its audio encoder is causal too, and numbers its layers as the text does."""
    audio = {k: v for k, v in TOWER.items() if k not in ("image_size", "patch_size")}
    audio |= {"num_key_value_heads": 4, "head_dim": 8, "num_mel_bins": 8, "vocab_size": 97}
    config = transformers.VoxtralRealtimeConfig(text_config={**TEXT, "head_dim": 8}, audio_config=audio)
    model = _made(config, transformers.VoxtralRealtimeForConditionalGeneration)
    return model, {"input_ids": _ids(0), "input_features": _pixels(1, 8, 480)}


def gpt2_reader() -> Made:
    """Every layer also reads another model's states (cross-attention, under the same layer number)."""
    config = transformers.GPT2Config(
        n_embd=48, n_layer=2, n_head=6, n_positions=256, vocab_size=97, add_cross_attention=True
    )
    return _made(config, transformers.GPT2LMHeadModel), {
        "input_ids": _ids(16),
        "encoder_hidden_states": _pixels(1, 100, 48),
    }


MODELS: dict[str, Callable[[], Made]] = {
    "gemma3": gemma3,
    "gemma4": gemma4,
    "gpt2_reader": gpt2_reader,
    "idefics3": idefics3,
    "llava": llava,
    "mllama": mllama,
    "paligemma": paligemma,
    "qwen2_5_vl": lambda: _qwen("2.5"),
    "qwen2_audio": qwen2_audio,
    "qwen2_vl": lambda: _qwen("2"),
    "qwen3_vl": lambda: _qwen("3"),
    "voxtral_realtime": voxtral_realtime,
}
