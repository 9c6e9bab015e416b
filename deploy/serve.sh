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
# A user who may not write to the image's home gets one in /tmp, and stays out of the other.
if [ ! -w "${HOME:-/nowhere}" ]; then
  HOME=$(mktemp -d)
  export HOME
  [ -x . ] || cd "$HOME"
fi
# shellcheck disable=SC2086
exec vllm serve ${model:+"$model"} $defaults "$@"
