#!/bin/sh
# Install the packages of a real Slurm where that is possible (Debian or Ubuntu, as root); otherwise say what is
# missing. Always succeeds, unless REQUIRE_SLURM=1 says that the Slurm tests must not be skipped.
set -u
programs="munged slurmctld slurmd slurmdbd sbatch sacctmgr mariadbd mariadb-install-db"
packages="slurmctld slurmd slurm-client slurmdbd munge mariadb-server"
PATH="$PATH:/usr/sbin:/sbin"

missing() {
    found=""
    for program in $programs; do
        command -v "$program" >/dev/null 2>&1 || found="$found $program"
    done
    echo "$found"
}

can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }

# CI runs some tests on the Slurm of another Debian release, too: `minicluster tree`. They are skipped without it.
if [ "${REQUIRE_SLURM:-}" = 1 ] && can_install && ! command -v debootstrap >/dev/null 2>&1; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends debootstrap >/dev/null; } ||
        echo "debootstrap could not be installed: no tests on another release's Slurm"
fi

[ -z "$(missing)" ] && exit 0
if can_install; then
    echo "installing $packages"
    export DEBIAN_FRONTEND=noninteractive
    # Debian starts the daemons of these packages; policy-rc.d keeps them down, since the minicluster runs its own.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && trap 'rm -f $policy' EXIT
    fi
    # shellcheck disable=SC2086
    apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages >/dev/null
fi
left=$(missing)
[ -z "$left" ] && exit 0
echo "no real Slurm on this machine: missing$left"
echo "the tests in tests/slurm are skipped; to run them: apt-get install --no-install-recommends $packages"
[ "${REQUIRE_SLURM:-}" != 1 ]
