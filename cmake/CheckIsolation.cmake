# Run as a test: cmake -DNM=... -DNAMESPACE=setformer::cpu::avx2 -DOBJECT=... -P CheckIsolation.cmake
#
# A function that an object offers to the linker for sharing (weak: templates and inline functions
# of the standard library or of ours) may replace the same function of every other object. Compiled
# with -mavx512f it would stop older processors with an illegal instruction, also in code that
# never chose AVX-512. So such functions may only lie in the namespace of the instruction set.
execute_process(COMMAND "${NM}" --defined-only --demangle "${OBJECT}"
                OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]* W [^\n]*" weak "${symbols}")
if(NOT symbols MATCHES "${NAMESPACE}::")
  message(FATAL_ERROR "${OBJECT} defines nothing in ${NAMESPACE}: is SETFORMER_ISA used?")
endif()
# Names that are too long for nm to demangle have the namespace as 9setformer3cpu4avx2.
string(REPLACE "::" ";" parts "${NAMESPACE}")
foreach(part ${parts})
  string(LENGTH "${part}" length)
  string(APPEND mangled "${length}${part}")
endforeach()
list(FILTER weak EXCLUDE REGEX "${NAMESPACE}::|${mangled}")
if(weak)
  list(JOIN weak "\n  " lines)
  message(FATAL_ERROR "${OBJECT} shares functions outside ${NAMESPACE}:\n  ${lines}")
endif()
