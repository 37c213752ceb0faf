# CPU:   docker build -t warp_ds .
# CUDA:  docker build -t warp_ds:cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 \
#            --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# The CUDA base has the compiler that DeepSpeed's operators want at their first use. Python 3.10 to 3.12 comes from the base.
ARG BASE=ubuntu:24.04
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PATH=/opt/warp_ds/bin:$PATH
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ git libaio-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/warp_ds

# torch first and by exact version, in a layer of its own: it is most of the image and changes least.
WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --extra-index-url ${TORCH_INDEX} torch
COPY pyproject.toml README.md LICENSE ./
COPY warp_ds warp_ds
RUN pip install --constraint constraints.txt '.[report]'

# What the package does not carry: starters by name, templates and configurations to edit.
COPY launch launch
COPY slurm slurm
COPY ds_configs ds_configs
COPY examples examples

WORKDIR /work
ENTRYPOINT ["warp-ds"]
CMD ["--help"]
