# ht-serve on a CPU, with an engine that was exported elsewhere:
#   docker build -f docker/cpu.Dockerfile -t ht-serve:cpu .
#   docker run -p 8000:8000 -v "$PWD/engines:/engines:ro" ht-serve:cpu /engines/engine.onnx
# To export a known model at the first start, build it with --build-arg EXTRAS=serve,export and keep /cache.
FROM python:3.12-slim AS built
ARG EXTRAS=serve,cpu
WORKDIR /source
COPY . .
RUN python -m venv /opt/ht && /opt/ht/bin/pip install --no-cache-dir ".[${EXTRAS}]"

FROM python:3.12-slim
COPY --from=built /opt/ht /opt/ht
RUN useradd --create-home --uid 10001 serve && mkdir /cache && chown serve /cache
USER serve
# Within the container all addresses are one; which ports are open is said by `docker run -p`.
ENV PATH=/opt/ht/bin:$PATH HT_SERVE_HOST=0.0.0.0 HT_CACHE=/cache PYTHONUNBUFFERED=1
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", \
    "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/live', timeout=5)"]
# SIGTERM drains: give it more time than --drain-s (docker stop --time 40).
STOPSIGNAL SIGTERM
ENTRYPOINT ["ht-serve"]
