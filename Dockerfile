# The function's image, which also runs `topup` (migration Job, resolver, operators):
# gunicorn over functions_framework.create_app, as uid 65532, on a read-only root.
#
# `make image` builds it. Whoever deploys it pins the base by digest, so that a build of
# next month is a build of next month's choice:
#   --build-arg PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# pip lives in an environment of its own, which stays behind.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/topup
WORKDIR /build
# Wheels that were fetched outside, for a build that reaches no package index
# (`make image BASE=local`); where there are none, pip asks its index. The hashes of the
# lock decide in both cases, and nothing is ever compiled from source.
COPY requirements.lock build/wheels* ./
RUN if ls ./*.whl >/dev/null 2>&1; then set -- --no-index --find-links=.; fi && \
    /opt/pip/bin/pip --python /opt/topup/bin/python install \
        --disable-pip-version-check --no-cache-dir --no-compile \
        --only-binary=:all: --require-hashes "$@" --requirement requirements.lock && \
    # function/ is not installed, only on PYTHONPATH: this is all its script would say.
    printf '%s\n' '#!/opt/topup/bin/python' 'from function.cli import main' 'main()' \
        >/opt/topup/bin/topup && \
    chmod 0755 /opt/topup/bin/topup && \
    # Nobody can write bytecode later, and without it a start takes thrice as long. It is
    # never compared with the sources, whose dates may change on their way.
    /opt/topup/bin/python -m compileall -q --invalidation-mode unchecked-hash \
        /opt/topup/lib
COPY function /app/function
# Whatever the umask of the checkout: everybody reads, nobody but root writes.
RUN chmod -R u=rwX,go=rX /app && \
    /opt/topup/bin/python -m compileall -q --invalidation-mode unchecked-hash /app

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/topup /opt/topup
COPY --from=build /app /app
WORKDIR /app
ENV PATH=/opt/topup/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PORT=8080
# A number, so that the kubelet can tell that it isn't root; the manifests say the same.
USER 65532:65532
EXPOSE 8080
# What gunicorn drains on. No HEALTHCHECK: the kubelet has probes, and heeds none.
STOPSIGNAL SIGTERM
CMD ["gunicorn", "--config", "function/gunicorn.conf.py"]
# Last, since the revision changes with every commit.
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.title="topup-function" \
      org.opencontainers.image.description="A Kafka record becomes exactly one recharge." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
