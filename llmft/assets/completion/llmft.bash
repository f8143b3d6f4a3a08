_llmft() {
    local line=${COMP_LINE:-} word=${COMP_WORDS[COMP_CWORD]}
    if [[ $line ]]; then line=${line:0:${COMP_POINT:-${#line}}}
    else line=${COMP_WORDS[*]:0:COMP_CWORD+1}; line=${line// =/=}; line=${line//= /=}; fi
    mapfile -t COMPREPLY < <(PYTHON -m llmft.completion query "$line" 2>/dev/null)
    # Bash takes "model=mi" for three words, and replaces the last one.
    if [[ ${line##* } == *=* && $word != ?*=* ]]; then COMPREPLY=("${COMPREPLY[@]#*=}"); fi
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=.] ]]; then compopt -o nospace 2>/dev/null; fi
}
_llmft_python() {
    if [[ ${COMP_WORDS[1]} == -m && ${COMP_WORDS[2]} == llmft* && $COMP_CWORD -gt 2 ]]; then _llmft
    elif [[ $_llmft_other ]]; then $_llmft_other "$@"; fi
}
if [[ $(complete -p python 2>/dev/null) =~ -F\ ([^ ]+) && ${BASH_REMATCH[1]} != _llmft_python ]]; then
    _llmft_other=${BASH_REMATCH[1]}
fi
complete -o bashdefault -o default -F _llmft llmft
complete -o bashdefault -o default -F _llmft_python python python3
