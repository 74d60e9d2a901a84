# The part of `python -m cifar_hpc completion bash` that shtab does not write. $1 is the beginning of the word.
cifar_hpc() { PYTHONPATH=@project@${PYTHONPATH:+:$PYTHONPATH} @python@ -m cifar_hpc "$@"; }

_cifar_hpc_runs() {
  local path root=@project@  # within quotes and braces its own quotes would be taken as they are
  for path in "${CIFAR_HPC_ROOT:-$root}"/logs/"$1"*/spec.yaml; do
    [[ -e $path ]] && path=${path%/*} && printf '%s\n' "${path##*/}"
  done
}
_cifar_hpc_runs_and_files() { _cifar_hpc_runs "$1"; compgen -f -- "$1"; }
_cifar_hpc_job_files() { compgen -f -X '!*.y*ml' -- "$1"; compgen -d -- "$1"; }
_cifar_hpc_files() { compgen -f -- "$1"; }
_cifar_hpc_directories() { compgen -d -- "$1"; }
_cifar_hpc_keys() { compgen -W '@keys@' -- "$1"; }
_cifar_hpc_profiles() {
  local path
  for path in @project@/slurm/clusters/"$1"*.yaml; do
    [[ -e $path ]] && path=${path##*/} && printf '%s\n' "${path%.yaml}"
  done
}
_cifar_hpc_partitions() { compgen -W "$(sinfo --noheader --format=%R 2>/dev/null)" -- "$1"; }

# A key is followed by its value, not by a blank.
_cifar_hpc_complete() { "$@"; [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2>/dev/null; return 0; }
_cifar_hpc_commands() { _cifar_hpc_complete _shtab_cifar_hpc "$@"; }
_cifar_hpc_submit() { _cifar_hpc_complete _shtab_submit_py "$@"; }
complete -o bashdefault -o default -F _cifar_hpc_commands cifar_hpc
complete -o bashdefault -o default -F _cifar_hpc_submit submit.py

# python -m cifar_hpc ... and python submit.py ... ; any other use of python is completed as it was before.
for _cifar_hpc_loader in _comp_load _completion_loader; do  # bash-completion's, which else waits for the first Tab
  declare -F "$_cifar_hpc_loader" >/dev/null && "$_cifar_hpc_loader" python 2>/dev/null
done
_cifar_hpc_found=$(complete -p python 2>/dev/null | sed -n 's/.* -F \([^ ]*\) .*/\1/p')
[[ $_cifar_hpc_found == _cifar_hpc_python ]] || _cifar_hpc_python_before=$_cifar_hpc_found
unset _cifar_hpc_loader _cifar_hpc_found
_cifar_hpc_python() {
  local skip=0
  [[ ${COMP_WORDS[1]-} == -m && ${COMP_WORDS[2]-} == cifar_hpc ]] && skip=2
  [[ ${COMP_WORDS[1]-} == submit.py || ${COMP_WORDS[1]-} == */submit.py ]] && skip=1
  if (( skip > 0 && COMP_CWORD > skip )); then
    COMP_WORDS=("${COMP_WORDS[@]:skip}")
    (( COMP_CWORD -= skip ))
    if (( skip == 2 )); then _cifar_hpc_commands; else _cifar_hpc_submit; fi
  elif [[ -n ${_cifar_hpc_python_before-} ]]; then
    "$_cifar_hpc_python_before" "$@"
  else
    COMPREPLY=()
  fi
}
complete -o bashdefault -o default -F _cifar_hpc_python python python3
