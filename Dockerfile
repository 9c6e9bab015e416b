# The inference server as an image: `docker build .` for NVIDIA GPUs, `docker build --target cpu .`
# for CPUs. How to use them: deploy/README.md.
#
# The bases are named by tag. To pin their bytes, look up the digest and pass it on:
#
#   docker buildx imagetools inspect python:3.11-slim-bookworm
#   make image IMAGE_ARGUMENTS="--build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:DIGEST"
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
ARG PYTHON_IMAGE=python:3.11-slim-bookworm


FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY vllm_atomic_moe vllm_atomic_moe
RUN python3 -m venv /build && /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /dist .


FROM ${PYTHON_IMAGE} AS cpu-environment
# The lock file pins torch's CPU build, which is in PyTorch's own index of CPU wheels.
ARG PIP_EXTRA_INDEX_URL
WORKDIR /requirements
COPY deploy/requirements-cpu.lock .
RUN python3 -m venv /opt/venv \
 && { /opt/venv/bin/pip install --no-cache-dir --no-deps --requirement requirements-cpu.lock \
      || { echo "If torch==...+cpu was not found: name PyTorch's index of CPU wheels (pytorch.org," \
           "'Get started') in make's PIP_EXTRA_INDEX_URL, the build argument of that name" >&2; \
           exit 1; }; }
COPY patches patches
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation ./patches/*/


# The compiler stays in this stage.
FROM cpu-environment AS cpu-kernels
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /dist /dist
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps /dist/*.whl \
 && ATOMIC_MOE_CACHE=/opt/atomic-moe/kernels /opt/venv/bin/python -m vllm_atomic_moe.experts.backends.cpu \
 && rm -f /opt/atomic-moe/kernels/*.lock


FROM ${PYTHON_IMAGE} AS cpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends libnuma1 \
 && rm -rf /var/lib/apt/lists/*
# The user of vLLM's own image. Any other user works too; those of group 0 share its home.
RUN useradd --uid 2000 --gid 0 --create-home --home-dir /home/vllm vllm \
 && mkdir -p /home/vllm/.cache/huggingface && chown -R 2000:0 /home/vllm/.cache \
 && chmod -R g=u /home/vllm && chmod a+rx /home/vllm && mkdir /models /profiles
COPY --from=cpu-environment /opt/venv /opt/venv
COPY --from=cpu-kernels /opt/atomic-moe/kernels /opt/atomic-moe/kernels
COPY deploy/serve.sh /opt/atomic-moe/serve
COPY deploy/demo/model /opt/atomic-moe/demo
COPY --from=wheel /dist /opt/atomic-moe/dist
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps /opt/atomic-moe/dist/*.whl \
 && chmod -R a+rX /opt/atomic-moe
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/vllm \
    USER=vllm \
    ATOMIC_MOE_CACHE=/opt/atomic-moe/kernels \
    VLLM_CPU_KVCACHE_SPACE=4 \
    VLLM_PLUGINS=atomic_moe,atomic_moe_admin
USER 2000:0
WORKDIR /home/vllm
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "from urllib.request import ProxyHandler, build_opener; \
build_opener(ProxyHandler({})).open('http://localhost:8000/health')"]
# Eager, because torch would need a compiler to compile the model.
ENTRYPOINT ["/opt/atomic-moe/serve", "--load-format atomic-pruned --enforce-eager"]
CMD ["/opt/atomic-moe/demo", "--served-model-name", "demo", "--model-loader-extra-config", \
     "{\"active\": \"heapr-20\", \"resident\": [\"heapr-40\"]}"]
ARG VERSION REVISION
LABEL org.opencontainers.image.title="vllm-atomic-moe" \
      org.opencontainers.image.description="vLLM for pruned Mixture-of-Experts models, on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


FROM ${VLLM_IMAGE} AS gpu
USER 0:0
# For `--distributed-executor-backend ray`; vLLM's image has none since 0.19.1.
RUN uv pip install --system --no-cache ray==2.60.0
COPY deploy/serve.sh /opt/atomic-moe/serve
COPY deploy/demo/model /opt/atomic-moe/demo
COPY --from=wheel /dist /opt/atomic-moe/dist
# Adds missing packages. vLLM and torch are excluded from the resolution, so they do not change.
RUN uv pip install --system --no-cache --no-deps /opt/atomic-moe/dist/*.whl \
 && python3 -c "from importlib.metadata import requires; \
print(*(it for it in requires('vllm-atomic-moe') \
if 'extra ==' not in it and not it.startswith(('torch', 'vllm'))), sep='\n')" > /tmp/lacking \
 && uv pip install --system --no-cache --requirement /tmp/lacking && rm /tmp/lacking \
 && chmod -R a+rX /opt/atomic-moe && mkdir -p /models /profiles /home/vllm/.cache/huggingface \
 && chown -R 2000:0 /home/vllm/.cache && chmod -R g=u /home/vllm/.cache && chmod a+rx /home/vllm
ENV HOME=/home/vllm \
    USER=vllm \
    VLLM_PLUGINS=atomic_moe,atomic_moe_admin
USER 2000:0
WORKDIR /home/vllm
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "from urllib.request import ProxyHandler, build_opener; \
build_opener(ProxyHandler({})).open('http://localhost:8000/health')"]
ENTRYPOINT ["/opt/atomic-moe/serve", "--load-format atomic-pruned"]
CMD ["/opt/atomic-moe/demo", "--served-model-name", "demo", "--model-loader-extra-config", \
     "{\"active\": \"heapr-20\", \"resident\": [\"heapr-40\"]}"]
ARG VERSION REVISION
LABEL org.opencontainers.image.title="vllm-atomic-moe" \
      org.opencontainers.image.description="vLLM for pruned Mixture-of-Experts models, on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
