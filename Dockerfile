# turbofit with LMDeploy, as LMDeploy publishes it. From a clone:
#
#   docker build --tag turbofit .
#   docker run --gpus all --publish 127.0.0.1:23333:23333 --volume hub:/var/cache/huggingface \
#     --volume state:/var/lib/turbofit turbofit serve internvl2-8b --host 0.0.0.0 --api-key KEY
#
# `turbofit export compose` and `turbofit export k8s` write the rest: GPUs, shared memory, health, shutdown.
# The tag is that of LMDeploy's release workflow (.github/workflows/docker.yml): version and CUDA.
FROM openmmlab/lmdeploy:v0.18.0-cu12.8

# The rehearsal builds its pretend libraries with it. The versions are Ubuntu's.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# pip leaves LMDeploy and torch as they are: the image's versions are within the extra's bounds.
COPY . /opt/turbofit
RUN pip install --no-cache-dir "/opt/turbofit[lmdeploy]" && rm -rf /opt/turbofit

# The hub's cache and turbofit's state are volumes; the user of the image may write to both.
RUN groupadd --gid 10001 turbofit && useradd --uid 10001 --gid 10001 --create-home turbofit \
    && mkdir -p /var/cache/huggingface /var/lib/turbofit \
    && chown turbofit:turbofit /var/cache/huggingface /var/lib/turbofit
ENV HF_HOME=/var/cache/huggingface XDG_STATE_HOME=/var/lib/turbofit PYTHONUNBUFFERED=1
VOLUME ["/var/cache/huggingface", "/var/lib/turbofit"]
WORKDIR /home/turbofit
USER 10001

EXPOSE 23333
ENTRYPOINT ["turbofit"]
CMD ["--help"]
