"""What a timing depends on besides the code: GPU, driver, clocks, CPU, threads."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_QUERY = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
)


def hardware(device: torch.device) -> dict[str, Any]:
    """The device by name, with what its speed depends on; called right after the timing.

    Keys: type, name, memory_bytes, threads (CPU), sms (GPU), platform; for a GPU also what nvidia-smi says of
    driver_version, clocks.sm, clocks.max.sm, clocks.mem, power.limit and temperature.gpu, where it exists.
    """
    return _device(device) | (_nvidia_smi(device) if device.type == "cuda" else {})


def machine(device: torch.device) -> dict[str, Any]:
    """What tells two machines apart whose times must not stand in one table; it stays the same while one works.

    Keys: type, name, memory_bytes, threads (CPU), sms (GPU), platform; for a GPU also uuid and driver_version.
    """
    if device.type == "cpu":
        return _device(device)
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    return _device(device) | {"uuid": uuid, "driver_version": _nvidia_smi(device).get("driver_version")}


def _device(device: torch.device) -> dict[str, Any]:
    common = {"type": device.type, "platform": f"{platform.system()} {platform.machine()}"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return common | {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "sms": properties.multi_processor_count,
            "threads": None,
        }
    return common | {
        "name": _cpu_name(),
        "memory_bytes": None,
        "sms": None,
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _nvidia_smi(device: torch.device) -> dict[str, str]:
    # By UUID: CUDA_VISIBLE_DEVICES renumbers what torch sees, not what nvidia-smi sees.
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    chosen = [f"--id=GPU-{uuid}"] if uuid else []
    command = ["nvidia-smi", *chosen, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [x.strip() for x in done.stdout.splitlines()[0].split(",")] if done.stdout.strip() else []
    return dict(zip(_QUERY, values, strict=False))
