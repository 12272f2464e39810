"""Packaging: two import roots from one repository. `prdp_kernels` is usable without `prdp_fast`.

`prdp doctor` reads the requirements from here without running this file. So they are lists of plain strings.
"""

from setuptools import find_packages, setup

# Ranges stay open here; constraints.txt pins the whole set that the tests run with.
CORE = [
    "torch>=2.10",
    "triton>=3.6; platform_system == 'Linux'",
    # diffusers left Python 3.10 behind with 0.42.
    "diffusers>=0.42; python_version >= '3.11'",
    "diffusers>=0.41; python_version < '3.11'",
    "transformers>=5",
    "accelerate>=1.0",
    "deepspeed>=0.19.8",  # earlier releases lose gradients when many backwards precede one step
    "ninja",  # deepspeed compiles its CPU communication op on first use
    "safetensors",
    "huggingface_hub>=1",
    "webdataset>=1.0",
    "pydantic>=2",
    "PyYAML>=6",
    "numpy>=1.26",
    "pillow>=10.1",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "rich>=13",
    "packaging>=22",  # `prdp doctor` judges versions with it
    # Prompts from a URL.
    "fsspec>=2024.2",
    "httpx2>=2",
    "tenacity>=9",
]
GPU = ["xformers>=0.0.35"]
REWARDS = [
    "httpx2>=2",
    "tenacity>=9",
    "fastapi>=0.115",
    "uvicorn>=0.30",
]  # the `http` reward and its server, imported on first use
LORA = ["peft>=0.18"]
DATA = ["pyarrow>=15", "datasets>=3"]  # `prdp shards build` from parquet files and hub data sets, imported on first use
S3 = ["s3fs>=2024.2"]  # prompts from an object store, imported by fsspec for a URL that begins so
GCS = ["gcsfs>=2024.2"]
WANDB = ["wandb>=0.31"]  # trackers of a run, imported by the recipes that name them
MLFLOW = ["mlflow-skinny>=3"]
PROMETHEUS = ["prometheus-client>=0.20"]
DOCS = ["mkdocs-material>=9.6"]  # `make docs`
DEV = [
    "hypothesis",
    "mypy",
    "pytest>=8.1",
    "pytest-benchmark",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "scipy",
    "setuptools>=70.1",  # the tests build a wheel, without the network; earlier releases need the package `wheel` for it
    "types-PyYAML",
]

setup(
    name="prdp-fast",
    version="0.1.0",
    description="High-throughput finetuning of text-to-image diffusion models on black-box rewards with PRDP",
    license="Apache-2.0",
    python_requires=">=3.10",
    # `kernels/` is a folder, not a package: that import name belongs to Hugging Face's kernel client.
    packages=[
        *find_packages(".", include=["prdp_fast", "prdp_fast.*"]),
        *find_packages("kernels", include=["prdp_kernels", "prdp_kernels.*"]),
        "prdp_fast.configs",
    ],
    # In a wheel `configs/` lies inside the package. config/load.py finds it there, and at the top of a clone.
    package_dir={"prdp_kernels": "kernels/prdp_kernels", "prdp_fast.configs": "configs"},
    package_data={
        "prdp_fast.configs": ["*.json", "recipes/*.yaml", "studies/*.yaml", "launch/*"],
        "prdp_fast.world": ["tiny/**/*", "tiny_flow/**/*", "tiny_scorer/**/*"],
    },
    entry_points={"console_scripts": ["prdp = prdp_fast.cli:main"]},
    install_requires=CORE,
    extras_require={
        "gpu": GPU,
        "rewards": REWARDS,
        "lora": LORA,
        "data": DATA,
        "s3": S3,
        "gcs": GCS,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "prometheus": PROMETHEUS,
        "docs": DOCS,
        "dev": [*DEV, *LORA, *DATA, *REWARDS, *PROMETHEUS],
    },
)
