# ht-serve on an NVIDIA GPU: a plan of TensorRT for RTX, or an ONNX engine with --build-arg EXTRAS=serve,cuda.
#   docker build -f docker/gpu.Dockerfile -t ht-serve:gpu .
#   docker run --gpus all -p 8000:8000 -v "$PWD/engines:/engines:ro" ht-serve:gpu /engines/engine.plan
# The base image has the libraries that ONNX Runtime needs; a plan brings its own.
FROM nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04 AS built
ARG EXTRAS=serve,tensorrt-rtx
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python3 -m venv /opt/ht && /opt/ht/bin/pip install --no-cache-dir ".[${EXTRAS}]"

FROM nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*
COPY --from=built /opt/ht /opt/ht
RUN useradd --create-home --uid 10001 serve && mkdir /cache && chown serve /cache
USER serve
ENV PATH=/opt/ht/bin:$PATH HT_SERVE_HOST=0.0.0.0 HT_CACHE=/cache PYTHONUNBUFFERED=1
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=300s CMD ["python3", "-c", \
    "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/live', timeout=5)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["ht-serve"]
