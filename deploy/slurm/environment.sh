# Where textalign stores everything, for the login node and all others: source this before any command.
# Every path must be the same on all machines.
export TEXTALIGN_HOME="${TEXTALIGN_HOME:-$HOME/textalign}"
export DAGSTER_HOME="$TEXTALIGN_HOME/dagster"
export TEXTALIGN_EXPERIMENTS="${TEXTALIGN_EXPERIMENTS:-$TEXTALIGN_HOME/experiments}"
export HF_HOME="$TEXTALIGN_HOME/huggingface"
mkdir -p "$DAGSTER_HOME" "$TEXTALIGN_EXPERIMENTS"
