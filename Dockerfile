# rpt-lightning for GPU nodes, with the versions of requirements.lock. We have neither built nor run it.
#   docker build --tag rpt-lightning .
#   docker run --rm --gpus all --ipc host --volume "$PWD:/work" rpt-lightning fit --config configs/1.5b.yaml
# torch is built for CUDA 13.0, so the node needs an NVIDIA driver of version 580 or later.
FROM python:3.11.7-slim-bookworm

# Triton and torch.compile call a compiler when a kernel is first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/rpt-lightning
COPY requirements.lock ./
# The lock is complete, so pip chooses nothing by itself. `pip check` fails if that is not so.
RUN pip install --no-cache-dir --no-deps --requirement requirements.lock && pip check
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

# Configs, tasks and runs come from the folder that is mounted here, for example a clone of the repository.
WORKDIR /work
ENTRYPOINT ["rpt"]
CMD ["--help"]
