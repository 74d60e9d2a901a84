# The part of `python -m cifar_hpc completion zsh` that shtab does not write.
cifar_hpc() { PYTHONPATH=@project@${PYTHONPATH:+:$PYTHONPATH} @python@ -m cifar_hpc "$@" }

_cifar_hpc_runs() {
  local root=@project@
  root=${CIFAR_HPC_ROOT:-$root}
  local -a runs=($root/logs/*/spec.yaml(N:h:t))
  compadd -a runs
}
_cifar_hpc_runs_and_files() { _cifar_hpc_runs; _files }
_cifar_hpc_job_files() { _files -g '*.(yaml|yml)' }
_cifar_hpc_files() { _files }
_cifar_hpc_directories() { _files -/ }
_cifar_hpc_keys() { local -a keys=(@keys@); compadd -S '' -a keys }
_cifar_hpc_profiles() {
  local -a names=(@project@/slurm/clusters/*.yaml(N:t:r))
  compadd -a names
}
_cifar_hpc_partitions() { local -a names=(${(f)"$(sinfo --noheader --format=%R 2>/dev/null)"}); compadd -a names }

# python -m cifar_hpc ... and python submit.py ... ; any other use of python is completed as it was before.
_cifar_hpc_python() {
  if (( CURRENT > 3 )) && [[ $words[2] == -m && $words[3] == cifar_hpc ]]; then
    shift 2 words; (( CURRENT -= 2 )); _shtab_cifar_hpc
  elif (( CURRENT > 2 )) && [[ ${words[2]:t} == submit.py ]]; then
    shift words; (( CURRENT -= 1 )); _shtab_submit_py
  elif (( $+functions[_python] )); then
    _python "$@"
  else
    _default "$@"
  fi
}
compdef _cifar_hpc_python python python3
