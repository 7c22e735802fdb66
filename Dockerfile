# scmdm on NVIDIA GPUs. This file has not been built or run: no container runtime was available when it was written.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /workspace/scmdm
COPY . .
RUN pip install --upgrade pip \
    && pip install --constraint constraints.txt --editable '.[all]'

ENTRYPOINT ["scmdm"]
CMD ["doctor"]
