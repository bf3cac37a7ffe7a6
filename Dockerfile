# For GPU machines: this package in PyTorch's own image, whose PyTorch, CUDA, NCCL and Triton stay as they are.
#   docker build -t megatron_tf .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD:/workspace" megatron_tf megatron-tf doctor
ARG TAG=2.11.0-cuda13.0-cudnn9-devel
FROM pytorch/pytorch:${TAG}

# compilers for our extensions now, and for Triton's kernels at run time
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*

# the image's packages belong to the system Python, which pip does not modify by default
ENV PIP_BREAK_SYSTEM_PACKAGES=1
# the dependencies of pyproject.toml, except torch
RUN python -m pip install --no-cache-dir \
    "backports.zstd>=1.0; python_version < '3.14'" \
    "gigatoken>=0.10" \
    "jinja2>=3.1.6" \
    "numpy>=1.26.4" \
    "orjson>=3.10" \
    "pydantic>=2.7,<3" \
    "pyyaml>=6.0.1" \
    "sentencepiece>=0.2.0" \
    "tokenizers>=0.22.1" \
    "tqdm>=4.66" \
    "xxhash>=3.4.1"

WORKDIR /opt/megatron_tf
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY megatron_tf megatron_tf
RUN python -m pip install --no-cache-dir --no-deps .

WORKDIR /workspace
CMD ["megatron-tf", "--help"]
