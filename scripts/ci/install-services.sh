#!/usr/bin/env bash
# What tests need that pip does not install: SLURM and munge (tests/launching), ip of iproute2 (tests in network
# namespaces), shellcheck. Only as root on Debian or Ubuntu; elsewhere, and where installing fails, those tests skip and
# say why. So it never fails.
set -u

missing=()
for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge ip:iproute2 shellcheck:shellcheck; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done

if [ ${#missing[@]} -eq 0 ]; then
    echo 'services    all there'
elif [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "services    not installed (no root, or no apt-get): ${missing[*]}; tests that need them skip"
else
    log=$(mktemp)
    # policy-rc.d keeps packages from starting daemons; tests start their own. One that is there already stays.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    if { timeout 120 apt-get update -q && timeout 400 apt-get install -y -q --no-install-recommends "${missing[@]}"; } \
        >"$log" 2>&1 </dev/null; then
        echo "services    installed: ${missing[*]}"
    else
        echo "services    not installed: ${missing[*]}; tests that need them skip ($(tail -n 1 "$log"))"
    fi
    rm -f "$log"
fi
exit 0
