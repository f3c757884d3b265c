# Of a variable's values only those have a meaning; NAME_CHOICE is the value in lower case.
function(setformer_check_choice name)
  string(TOLOWER "${${name}}" value)
  if(NOT value IN_LIST ARGN)
    list(JOIN ARGN ", " choices)
    message(FATAL_ERROR "${name} must be one of ${choices}, got \"${${name}}\".")
  endif()
  set(${name}_CHOICE "${value}" PARENT_SCOPE)
endfunction()
