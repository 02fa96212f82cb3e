#!/usr/bin/env bash
# Run every check of this folder on a machine with a GPU: tests/gpu/run.sh [--device cpu]
# Those of several processes run where there are two GPUs. ONLY='fsdp ddp' runs the checks whose names hold one of these words;
# LIMIT is how many seconds each may take (300).
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/environment.sh"

failed=0
summary=""

check() { # name of a script, then its arguments
    local name=$1 start=$SECONDS code word wanted=${ONLY:+no}
    shift
    for word in ${ONLY:-}; do
        case "$name" in *"$word"*) wanted= ;; esac
    done
    [ -z "$wanted" ] || return 0
    echo "=== $name"
    timeout --kill-after=5 "${LIMIT:-300}" "$python" -S "$here/$name" "$@"
    code=$?
    [ "$code" -eq 0 ] || failed=1
    summary+=$(printf '%-26s %s after %d s' "$name" "$([ "$code" -eq 0 ] && echo passed || echo "FAILED ($code)")" $((SECONDS - start)))$'\n'
}

check check_precision_cuda.py "$@"
case " $* " in
*" cpu "*) summary+="utilities, transfer, replayed_ddp skipped: they need CUDA"$'\n' ;;
*)
    check check_utilities_cuda.py
    check check_transfer_cuda.py
    check check_replayed_ddp_cuda.py
    ;;
esac
check check_trainer_cuda.py "$@"
check check_compile_cuda.py "$@"
check check_memory_cuda.py "$@"
check check_fabric_cuda.py "$@"
check check_deepspeed_cuda.py
gpus=$("$python" -S -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -ge 2 ]; then
    check check_ddp_cuda.py
    check check_launchers_nccl.py
    check check_fsdp_cuda.py
    check check_model_parallel_cuda.py
else
    summary+="ddp, launchers, fsdp, model_parallel skipped: they need two GPUs"$'\n'
fi
printf '\n=== summary\n%s' "$summary"
exit "$failed"
