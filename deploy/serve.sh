#!/bin/sh
# An image's entry point: `vllm serve` with default flags, the first argument here, which the
# command line overrides. vLLM wants the model first, and of a flag given twice takes the last.
set -eu
defaults=$1
shift
case "${1--}" in
-*) ;;
*) model=$1 && shift ;;
esac
# shellcheck disable=SC2086
exec vllm serve ${model:+"$model"} $defaults "$@"
