# The three programs, for a machine with a GPU: docker run --gpus all --ipc=host -v "$PWD":/work IMAGE train KEY=VALUE ...
# The CUDA libraries come with the torch wheels. The base image and gcc provide what Triton needs to compile.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-dev python3-venv gcc git \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# Dependencies first: they change rarely, so this layer stays cached.
COPY requirements.lock /tmp/requirements.lock
RUN pip install --no-cache-dir --require-hashes -r /tmp/requirements.lock

COPY . /tmp/source
RUN pip install --no-cache-dir --no-deps /tmp/source && rm -rf /tmp/source

WORKDIR /work
ENTRYPOINT ["safer-instruct"]
