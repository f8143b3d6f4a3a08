_llmft() {
    local -a replies
    replies=(${(f)"$(PYTHON -m llmft.completion query "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)"})
    if (( ! $#replies )); then compset -P '*='; _files; return; fi
    compadd -Q -S '' -- ${(M)replies:#*[=.]}
    compadd -Q -- ${replies:#*[=.]}
}
_llmft_python() {
    if [[ $words[2] == -m && $words[3] == llmft* && $CURRENT -gt 3 ]]; then _llmft; else _python "$@"; fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
autoload -Uz _python
compdef _llmft llmft
compdef _llmft_python python python3
