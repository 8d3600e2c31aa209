#!/bin/sh
# Install what the tests of `make test-cluster` need of the system: Debian's Slurm with its accounting, and iproute2.
# Needs root. Starts nothing: the tests start and end their own daemons.
set -eu
packages="munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins slurmdbd slurm-wlm-mysql-plugin mariadb-server iproute2"

missing=""
for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -z "$missing" ] && exit 0

[ "$(id -u)" = 0 ] || { echo "install-cluster: not root, cannot install:$missing" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "install-cluster: no apt-get; expected Debian or a relative of it" >&2; exit 1; }
echo "install-cluster:$missing"
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 # the packages' own services are not started
apt-get update -qq || true                       # the lists at hand may do
# shellcheck disable=SC2086  # the list is words on purpose
apt-get install -y -qq --no-install-recommends $missing >/dev/null
