#!/usr/bin/env bash
# Builds liblplb_nvshmem.so: build.sh OUTPUT NVSHMEM_HOME [-gencode ... for nvcc]. NVSHMEM_HOME holds include/ and lib/ (of the wheel
# nvidia-nvshmem-cu13, for one). nvcc: $NVCC, else the one on PATH. setup.py calls this.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
output=$1 home=$2
shift 2
nvcc=${NVCC:-nvcc}
host=$(ls "$home"/lib/libnvshmem_host.so* | head -1)
[ $# -gt 0 ] || set -- -arch=sm_90
toolkit=$(dirname "$(dirname "$(readlink -f "$(command -v "$nvcc")")")")
"$nvcc" "$@" -O3 -std=c++17 -rdc=true -shared -Xcompiler -fPIC \
    -I"$here/../../include" -I"$home/include" "$here/rail.cu" -o "$output" -L"$toolkit/lib" \
    -L"$home/lib" -lnvshmem_device -Xlinker "$host" \
    -Xlinker --version-script="$here/rail.map" -Xlinker -soname=liblplb_nvshmem.so.0 \
    -Xlinker -z -Xlinker relro -Xlinker -z -Xlinker now -Xlinker -s
