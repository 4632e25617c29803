# One image for the server, the clients and the operator's commands: what it runs is its argument.
#
#   docker build --tag seqfed .
#   docker run --volume seqfed-state:/state --volume ./tls:/federation/server seqfed \
#     server --host 0.0.0.0 --state /state --tls /federation/server
#   docker run seqfed submit --help
#
# Every dependency is a wheel, so no stage holds a compiler. Versions are those of constraints.txt.
#
# TORCH_INDEX: one more place to look for torch. Without it Linux gets the default build with its
# CUDA libraries, several GB. For a machine without a GPU pass the address that pytorch.org's install
# page gives for the CPU build:  docker build --build-arg TORCH_INDEX=ADDRESS .

# --- the wheel of this tree and the list of what it needs, made outside the image ------------------
FROM python:3.11-slim AS wheel
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --constraint constraints.txt hatchling
COPY pyproject.toml README.md LICENSE ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > requirements.txt
COPY common common
COPY server server
COPY client client
RUN /venv/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

# --- dependencies first: this layer changes only when they or their pins do ------------------------
FROM python:3.11-slim AS base
ARG TORCH_INDEX=""
WORKDIR /opt/seqfed
COPY --from=wheel /src/constraints.txt /src/requirements.txt ./
RUN python -m venv . \
    && bin/pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
COPY --from=wheel /wheels /wheels
RUN bin/pip install --no-cache-dir --no-deps --no-index /wheels/*.whl

# A fixed id, so that a folder mounted from the host can be given to it: chown 7733 FOLDER.
RUN useradd --uid 7733 --user-group --create-home --home-dir /var/lib/seqfed seqfed \
    && mkdir -p /data /state /federation/ca /federation/server /federation/viewer /federation/operator /federation/tokens \
    && chown -R seqfed:seqfed /data /state /federation
ENV PATH=/opt/seqfed/bin:$PATH \
    PYTHONUNBUFFERED=1
USER seqfed
WORKDIR /var/lib/seqfed
# The server's store, or a client's identity and parameters. (A client's NPZ files: mount at /data.)
VOLUME ["/state"]

# --- with scikit-learn, which carries the digits that docker-compose.yml trains on -----------------
FROM base AS digits
USER root
RUN pip install --no-cache-dir --constraint /opt/seqfed/constraints.txt scikit-learn
USER seqfed

# --- the image itself: last, and so what `docker build` without --target makes ---------------------
FROM base AS runtime
EXPOSE 7733
# Asks the server in this container over loopback; with TLS it needs SEQFED_CREDENTIALS, a viewer's. A container that runs
# a client turns it off.
HEALTHCHECK --interval=10s --timeout=10s --start-period=30s --retries=3 \
    CMD ["seqfed", "health", "--server", "127.0.0.1:7733"]
ENTRYPOINT ["seqfed"]
# Beyond loopback the server wants certificates (seqfed ca --help); docker-compose.yml shows how they are made.
CMD ["--help"]
