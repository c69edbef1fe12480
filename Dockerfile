# syntax=docker/dockerfile:1
# One image for every node: docker build --build-arg COMMIT="$(git rev-parse HEAD)" -t megatron_kvpo .
#
# NVIDIA's image brings torch, Triton, NCCL, cuDNN and Transformer Engine, built for each other: 25.12 has
# torch 2.10, CUDA 13.1 and Python 3.12. A newer one is a --build-arg BASE away; the smoke test below judges it.
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# Not root: a run needs nothing of it. On a cluster give the number of an account that may write checkpoints.
ARG USER_ID=10001
RUN useradd --uid "${USER_ID}" --create-home --shell /bin/bash kvpo

# Packages first: this layer lasts until a pin moves. The image pins everything that it came with in
# /etc/pip/constraint.txt; ours holds what was built together and takes our pins for the rest.
WORKDIR /opt/megatron_kvpo
COPY requirements requirements
RUN --mount=type=cache,target=/root/.cache/pip \
    python requirements/keep_image.py > /opt/keep.txt && \
    PIP_CONSTRAINT=/opt/keep.txt pip install -r requirements/gpu.txt

# The checkout, from which everything is started; `runs` is where recipes write unless they say otherwise.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_kvpo megatron_kvpo
RUN PIP_CONSTRAINT="" pip install --no-cache-dir --no-deps --no-build-isolation --editable .
COPY tools tools
COPY launch launch
COPY tests tests
COPY examples examples
RUN install --directory --owner=kvpo runs data checkpoints

# What preflight compares over ranks, and what every figure is filed under.
ARG COMMIT=""
ENV MEGATRON_KVPO_COMMIT=${COMMIT}
USER ${USER_ID}

# Smoke test, without a GPU: the versions that were asked for, a few tests, one whole update on the CPU.
RUN python -c "import importlib.metadata as m; [print(n, m.version(n)) for n in ('torch', 'transformer-engine', 'megatron-core', 'nvidia-dali-cuda130')]" && \
    python -m pytest -q -p no:cacheprovider tests/unit/test_settings.py tests/unit/test_flow.py tests/unit/test_topologies.py && \
    TORCHDYNAMO_DISABLE=1 launch/pretrain_kvpo.sh examples/shapes/demo.yaml --module tools.preflight \
        device=cpu folder=/tmp/preflight --shared-memory-gib 0.03 --disk-gib 1 && \
    rm -r /tmp/preflight

CMD ["bash"]
