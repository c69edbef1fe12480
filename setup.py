"""Packaging. What a checkout installs, pinned, stands in requirements/; here are the bounds."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "(.+)"', (HERE / "megatron_kvpo" / "__init__.py").read_text(), re.MULTILINE
)[1]
README = HERE / "README.md"

RUNTIME = [
    "torch>=2.6",
    "megatron-core>=0.16.1",  # 0.17 and later need Python 3.12
    "numpy",
    "pillow",
    "packaging",  # megatron-core imports it
    "peft>=0.17",
    "transformers>=4.57",
    "diffusers>=0.35",
    "safetensors",
    "pyyaml",
    "nvidia-dali-cuda130>=2.0",  # decodes on a CPU too, and needs no CUDA there
    "av>=14",
    "matplotlib",
    "tqdm",
    "httpx",
    "wandb",
]
EXTRAS = {
    "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9"],
    "reward": ["accelerate", "fastapi", "uvicorn"],
    "tensorboard": ["tensorboard>=2.15"],
    "dev": [
        "pytest>=8",
        "pytest-xdist",
        "ruff",
        "mypy>=1.11",
        "types-PyYAML",
        "scipy",
        "scikit-video",
        "tensorboard>=2.15",
    ],
}

setup(
    name="megatron-kvpo",
    version=VERSION,
    description="Online GRPO for streaming video generators, on megatron-core",
    long_description=README.read_text() if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_kvpo", "megatron_kvpo.*"]),
    package_data={"megatron_kvpo": ["**/*.yaml", "**/*.json", "**/*.jsonl", "**/*.safetensors"]},
    install_requires=RUNTIME,
    extras_require=EXTRAS,
)
