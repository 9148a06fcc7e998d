# turbofit with LMDeploy, as LMDeploy publishes it. From a clone:
#
#   docker build --tag turbofit .
#   docker run --gpus all --publish 127.0.0.1:23333:23333 --volume hub:/var/cache/huggingface \
#     --volume state:/var/lib/turbofit turbofit serve internvl2-8b --host 0.0.0.0 --api-key KEY
#
# `turbofit export compose` and `turbofit export k8s` write the rest: GPUs, shared memory, health, shutdown.
# ./scripts/image builds and tries it. CUDA 13: --build-arg CUDA=cu13.0. Pinned by digest, as `docker buildx imagetools
# inspect openmmlab/lmdeploy:v0.18.0-cu12.8` shows it: --build-arg LMDEPLOY=v0.18.0-cu12.8@sha256:...
# The tag is that of LMDeploy's release workflow (.github/workflows/docker.yml): version and CUDA.
ARG CUDA=cu12.8
ARG LMDEPLOY=v0.18.0-${CUDA}
FROM openmmlab/lmdeploy:${LMDEPLOY}

# The installation compiles what resizes images with it, the rehearsal its pretend libraries. The versions are Ubuntu's.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# What turbofit needs comes first: a change of its source leaves this layer. pip leaves LMDeploy and torch as they are:
# the image's versions are within the extra's bounds.
COPY pyproject.toml /opt/
RUN python3 -c 'import tomllib; p = tomllib.load(open("/opt/pyproject.toml", "rb"))["project"]; \
    extras = p["optional-dependencies"]; needs = p["dependencies"] + extras["gateway"] + extras["lmdeploy"]; \
    print("\n".join(n for n in needs if not n.startswith("turbofit")))' > /opt/requirements.txt \
    && pip install --no-cache-dir --requirement /opt/requirements.txt

COPY . /opt/turbofit
RUN pip install --no-cache-dir --no-deps /opt/turbofit && rm -rf /opt/turbofit /opt/pyproject.toml

# The hub's cache and turbofit's state are volumes; the user of the image may write to both.
RUN groupadd --gid 10001 turbofit && useradd --uid 10001 --gid 10001 --create-home turbofit \
    && mkdir -p /var/cache/huggingface /var/lib/turbofit \
    && chown turbofit:turbofit /var/cache/huggingface /var/lib/turbofit
ENV HF_HOME=/var/cache/huggingface XDG_STATE_HOME=/var/lib/turbofit PYTHONUNBUFFERED=1
VOLUME ["/var/cache/huggingface", "/var/lib/turbofit"]
WORKDIR /home/turbofit
USER 10001

ARG VERSION=
ARG URL=
LABEL org.opencontainers.image.title="turbofit" \
    org.opencontainers.image.description="LMDeploy vision-language servers that do not run out of GPU memory" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.source="${URL}"

EXPOSE 23333
ENTRYPOINT ["turbofit"]
CMD ["--help"]
