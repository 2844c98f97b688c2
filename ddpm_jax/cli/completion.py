"""ddpm completion bash|zsh

Print a script that completes subcommands, flags, config fields and packaged configs:

  source <(ddpm completion bash)          in ~/.bashrc
  source <(ddpm completion zsh)           in ~/.zshrc
"""

from ddpm_jax import names
from ddpm_jax.errors import UserError

# The words are in the script, so that a key press starts no Python.
BASH = """_ddpm() {{
  local line=${{COMP_LINE:0:$COMP_POINT}} cur words= IFS=$' \\t\\n'
  cur=${{line##*[[:space:]]}}
  local before=(${{line%"$cur"}})
  if (( ${{#before[@]}} == 1 )); then words="{subcommands} help --version"
  elif [[ $cur == *=* ]]; then
    case $cur in
      --config=*) words="{configs}" ;;
      {values}
    esac
    local value=${{cur#*=}}
    COMPREPLY=($(compgen -W "$words" -- "$value"))
    [[ -n $words ]] || COMPREPLY=($(compgen -f -- "$value"))
    # Where = divides words, as by default, bash replaces what follows it; else the whole word.
    [[ $COMP_WORDBREAKS == *=* ]] || COMPREPLY=("${{COMPREPLY[@]/#/${{cur%%=*}}=}}")
    return
  else
    case ${{before[1]}} in
{flags}
    esac
    [[ $cur == --config.* && -z ${{words##*--config=*}} ]] && words="{fields}"
  fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}}
complete -o default -F _ddpm ddpm
"""
ZSH = "autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit\n"


def define_flags(define):
    pass


def script() -> str:
    """For bash."""
    from ddpm_jax.cli import main

    flags, values = {}, {}
    for name in main.SUBCOMMANDS:
        own = main.definer(name)[1].values
        flags[name] = [f"--{flag}" + ("" if own[flag].boolean else "=") for flag in own]
        values |= {flag: own[flag].parser.enum_values for flag in own
                   if hasattr(own[flag].parser, "enum_values")}
    return BASH.format(
        subcommands=" ".join(main.SUBCOMMANDS), configs=" ".join(names.packaged_configs()),
        values="\n      ".join(f'--{flag}=*) words="{" ".join(known)}" ;;'
                               for flag, known in values.items()),
        flags="\n".join(f'      {name}) words="{" ".join(own)}" ;;'
                        for name, own in flags.items()),
        fields=" ".join(f"--config.{field.name}=" for field in names.config_fields()))


def for_zsh() -> str:
    """zsh's emulation of bash cannot leave out the space behind a flag that takes a value alone."""
    return ZSH + script().replace("complete -o default", "complete -o nospace")


SHELLS = {"bash": script, "zsh": for_zsh}


def main(values, words):
    if len(words) != 1 or words[0] not in SHELLS:
        raise UserError(f"completion {' '.join(words)}: expected {' or '.join(SHELLS)}")
    print(SHELLS[words[0]](), end="")
    return 0
