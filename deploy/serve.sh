#!/bin/sh
# An image's entry point: `vllm serve` with default flags, the first argument here, which the
# command line overrides. vLLM wants the model first, and uses the last of a repeated flag.
set -eu
defaults=$1
shift
case "${1--}" in
-*) ;;
*) model=$1 && shift ;;
esac
# A user who cannot write to the image's home gets one in /tmp instead.
if [ ! -w "${HOME:-/nowhere}" ]; then
  HOME=$(mktemp -d)
  export HOME
  [ -x . ] || cd "$HOME"
fi
# shellcheck disable=SC2086
exec vllm serve ${model:+"$model"} $defaults "$@"
