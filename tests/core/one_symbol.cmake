# A kernel object exports its table and nothing else: whatever else it exported, the linker could
# pick for code that must run on older machines.
execute_process(COMMAND ${NM} --defined-only --extern-only ${OBJECT}
                OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY OUTPUT_STRIP_TRAILING_WHITESPACE)
string(REPLACE "\n" ";" symbols "${symbols}")
list(LENGTH symbols count)
if(NOT count EQUAL 1 OR NOT symbols MATCHES "kernels_")
  message(FATAL_ERROR "expected one symbol, the table, in ${OBJECT}, got ${count}:\n${symbols}")
endif()
