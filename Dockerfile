# An image that trains, for the CPU or for NVIDIA cards:
#   docker build --build-arg DEVICE=cpu -t cosmos-ssl:cpu .
#   docker build --build-arg DEVICE=cuda12 -t cosmos-ssl:cuda12 .
# CUDA's libraries come with PyTorch's wheels; the driver is the host's. For DEVICE=cpu, too, unless PIP_OPTIONS says where
# smaller ones are: it is given to pip as it stands, such as --extra-index-url and the index of wheels for the CPU that
# PyTorch's installation page names. How the image is run says launch/README.md.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
# cpu, or the name of an extra in pyproject.toml: cuda12, cuda13
ARG DEVICE=cpu
ARG PIP_OPTIONS=
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python -m venv /opt/venv
WORKDIR /build

# What the project needs, a layer that is made anew when pyproject.toml changes, and not with every change of the sources
COPY pyproject.toml ./
RUN python -c "import os, tomllib; \
    project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = {'cpu': [], **project['optional-dependencies']}; \
    print('\n'.join(project['dependencies'] + extras[os.environ['DEVICE']]))" > requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    read -ra options <<< "$PIP_OPTIONS"; \
    /opt/venv/bin/pip install "${options[@]}" -r requirements.txt

COPY README.md LICENSE ./
COPY cosmos_ssl cosmos_ssl
COPY plugins/cosmos_ssl_plugins plugins/cosmos_ssl_plugins
COPY launch/cosmos_ssl_launch launch/cosmos_ssl_launch
COPY configs configs
RUN --mount=type=cache,target=/root/.cache/pip /opt/venv/bin/pip install --no-deps .

FROM python:${PYTHON}-slim-bookworm
ARG DEVICE=cpu
# Triton compiles the launchers of kernels on cards where they run
# hadolint ignore=DL3008
RUN if [ "$DEVICE" != cpu ]; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
# Whoever runs it may be another user (docker run --user, Apptainer), and writes here
RUN useradd --uid 1000 --home-dir /workspace --create-home cosmos && chmod 1777 /workspace
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/workspace
USER 1000
WORKDIR /workspace
ENTRYPOINT ["cosmos-launch"]
CMD ["--help"]
