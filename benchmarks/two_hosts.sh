#!/usr/bin/env bash
# Compares the methods across a slow link: two network namespaces of this machine, joined at 1 Gbit/s, as two hosts.
#
# One rank on each, and every method of `compare`: DDP, FSDP, the three kinds of tensor parallelism, phantom, and DDP of a
# dense model that is as small as phantom's.
#
#     sudo benchmarks/two_hosts.sh                                   # benchmarks/ffn.yaml: n = 4096, depth 4, k = 64, p = 2
#     sudo RATE=10gbit benchmarks/two_hosts.sh --config run.yaml     # your own; options as for `lightning-phantom compare`
#
# Needs root, and ip and tc (Debian: apt-get install iproute2). Nothing outside the two namespaces is touched, and they
# are removed at the end, whatever happens.
set -euo pipefail

rate=${RATE:-1gbit}
python=${PYTHON:-python}
here=$(cd "$(dirname "$0")/.." && pwd)

[ "$(id -u)" = 0 ] || { echo "two_hosts.sh: needs root, to make network namespaces." >&2; exit 2; }
for tool in ip tc; do
  command -v "$tool" >/dev/null || { echo "two_hosts.sh: $tool is missing: apt-get install iproute2" >&2; exit 2; }
done
[ $# -gt 0 ] || set -- --config benchmarks/ffn.yaml --num-blocks 2

name=lp$$
nodes=()
cleanup() {
  trap - EXIT INT TERM
  for node in "${nodes[@]}"; do kill "$node" 2>/dev/null || true; done
  wait || true
  for end in 1 2; do ip netns delete "$name-$end" 2>/dev/null || true; done
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for end in 1 2; do
  ip netns add "$name-$end"
done
ip link add "$name-1" netns "$name-1" type veth peer name "$name-2" netns "$name-2"
for end in 1 2; do
  ip -n "$name-$end" address add "10.0.0.$end/24" dev "$name-$end"
  ip -n "$name-$end" link set lo up
  ip -n "$name-$end" link set "$name-$end" up
  tc -n "$name-$end" qdisc add dev "$name-$end" root tbf rate "$rate" burst 256kb latency 50ms
done

cd "$here"
threads=$(($(nproc) / 2))
for end in 2 1; do
  # A namespace of its own has every port free.
  ip netns exec "$name-$end" env GLOO_SOCKET_IFNAME="$name-$end" TP_SOCKET_IFNAME="$name-$end" \
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}" \
    "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --local-addr "10.0.0.$end" \
    --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29400 --rdzv-conf "is_host=$((end == 1))" --rdzv-id "$name" \
    -m lightning_phantom compare "$@" &
  nodes+=($!)
done
status=0
for node in "${nodes[@]}"; do wait "$node" || status=$?; done
exit "$status"
