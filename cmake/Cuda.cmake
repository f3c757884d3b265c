# Decides whether CUDA is compiled, for which architectures, and says why. Sets
#   SETFORMER_CUDA_ENABLED, SETFORMER_CUDA_DECISION (one line), CMAKE_CUDA_ARCHITECTURES,
#   SETFORMER_CUDA_OPTIONS (of the compiler).

set(SETFORMER_CUDA_DEFAULT auto)
if(DEFINED ENV{SETFORMER_CUDA})
  set(SETFORMER_CUDA_DEFAULT "$ENV{SETFORMER_CUDA}")
endif()
set(SETFORMER_CUDA "${SETFORMER_CUDA_DEFAULT}" CACHE STRING "Compile CUDA: auto, on or off")
string(TOLOWER "${SETFORMER_CUDA}" SETFORMER_CUDA_SWITCH)
if(NOT SETFORMER_CUDA_SWITCH MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "SETFORMER_CUDA must be auto, on or off, got \"${SETFORMER_CUDA}\".")
endif()

set(SETFORMER_CUDA_ENABLED OFF)

# Where an environment variable names a toolkit, that one wins over PATH.
function(setformer_find_nvcc)
  find_program(SETFORMER_NVCC nvcc
    HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
    PATHS /usr/local/cuda
    DOC "CUDA compiler")
endfunction()

# Leaves in problem what hinders nvcc from compiling an empty file: most often a host compiler
# that it does not support.
function(setformer_probe_nvcc problem)
  set(probe "${CMAKE_BINARY_DIR}/nvcc_probe.cu")
  file(WRITE "${probe}" "")
  execute_process(
    COMMAND "${CMAKE_CUDA_COMPILER}" -ccbin "${CMAKE_CUDA_HOST_COMPILER}" -c "${probe}"
            -o "${probe}.o"
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(status EQUAL 0)
    set(${problem} "" PARENT_SCOPE)
    return()
  endif()
  string(STRIP "${output}" output)
  string(REGEX REPLACE "[\r\n]+" " | " output "${output}")
  set(${problem} "it fails with status ${status}: ${output}" PARENT_SCOPE)
endfunction()

# CMAKE_CUDA_ARCHITECTURES or CUDAARCHS (CMake's syntax), else TORCH_CUDA_ARCH_LIST (torch's,
# "8.0;9.0a+PTX"), else every architecture below that nvcc knows, with PTX of the newest so that
# later devices can run it.
function(setformer_choose_architectures)
  if(DEFINED CMAKE_CUDA_ARCHITECTURES OR NOT "$ENV{CUDAARCHS}" STREQUAL "")
    return()
  endif()
  set(architectures)
  if(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
    string(REGEX REPLACE "[ ,;]+" ";" entries "$ENV{TORCH_CUDA_ARCH_LIST}")
    foreach(entry IN LISTS entries)
      if(NOT entry MATCHES "^([0-9]+)\\.([0-9][a-z]?)(\\+PTX)?$")
        message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected entries such as 8.0 or 9.0+PTX, "
                            "got \"${entry}\".")
      endif()
      set(architecture "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
      if(NOT CMAKE_MATCH_3)
        string(APPEND architecture "-real")
      endif()
      list(APPEND architectures "${architecture}")
    endforeach()
  else()
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known)
    foreach(architecture 75 80 86 89 90 100 120)
      if(known MATCHES "compute_${architecture}[\r\n]")
        list(APPEND architectures "${architecture}-real")
        set(newest "${architecture}")
      endif()
    endforeach()
    list(APPEND architectures "${newest}-virtual")
  endif()
  set(CMAKE_CUDA_ARCHITECTURES "${architectures}" CACHE STRING "CUDA architectures")
endfunction()

# The kernels use nothing newer than compute capability 8.0, so one PTX serves all later devices:
# that of each would multiply the build time, and so it is the PTX that tests run. Leaves an empty
# list where the architectures are not plain numbers ("native", "90a"): CMake knows those.
function(setformer_share_ptx options)
  set(${options} "" PARENT_SCOPE)
  set(code)
  foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
    if(NOT architecture MATCHES "^([0-9]+)(-real|-virtual)?$")
      return()
    endif()
    set(number "${CMAKE_MATCH_1}")
    set(kind "${CMAKE_MATCH_2}")
    set(ptx "${number}")
    if(number GREATER 80)
      set(ptx 80)
    endif()
    if(NOT kind STREQUAL "-virtual")
      list(APPEND code "-gencode=arch=compute_${ptx},code=sm_${number}")
    endif()
    if(NOT kind STREQUAL "-real")
      list(APPEND code "-gencode=arch=compute_${ptx},code=compute_${ptx}")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES code)
  set(${options} "${code}" PARENT_SCOPE)
endfunction()

if(SETFORMER_CUDA_SWITCH STREQUAL "off")
  set(SETFORMER_CUDA_DECISION "not compiled: SETFORMER_CUDA=off")
else()
  if(NOT CMAKE_CUDA_COMPILER)
    if(NOT "$ENV{CUDACXX}" STREQUAL "")
      set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}")
    else()
      setformer_find_nvcc()
      if(SETFORMER_NVCC)
        set(CMAKE_CUDA_COMPILER "${SETFORMER_NVCC}")
      endif()
    endif()
  endif()

  if(NOT CMAKE_CUDA_COMPILER)
    set(problem "nvcc was found neither in CUDA_HOME, CUDA_PATH and PATH nor in /usr/local/cuda")
  else()
    if(NOT CMAKE_CUDA_HOST_COMPILER)
      set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
      if(NOT "$ENV{CUDAHOSTCXX}" STREQUAL "")
        set(CMAKE_CUDA_HOST_COMPILER "$ENV{CUDAHOSTCXX}")
      endif()
    endif()
    setformer_probe_nvcc(problem)
    if(problem)
      set(problem "${CMAKE_CUDA_COMPILER} cannot compile: ${problem}")
    endif()
  endif()

  if(NOT problem)
    setformer_choose_architectures()
    enable_language(CUDA)
    set(SETFORMER_CUDA_ENABLED ON)
    setformer_share_ptx(SETFORMER_CUDA_CODE)
    # Profilers show source lines; ptxas tells of registers that do not fit; compressed, seven
    # architectures and their line tables take a fifth of the room.
    set(SETFORMER_CUDA_OPTIONS
        -lineinfo --expt-relaxed-constexpr -Xptxas=-warn-spills -Xfatbin=-compress-all
        ${SETFORMER_CUDA_CODE})
    set(SETFORMER_CUDA_DECISION
        "compiled by nvcc ${CMAKE_CUDA_COMPILER_VERSION} (${CMAKE_CUDA_COMPILER})")
  elseif(SETFORMER_CUDA_SWITCH STREQUAL "on")
    message(FATAL_ERROR
      "SETFORMER_CUDA=on, but ${problem}.\n"
      "Install the CUDA toolkit (its compiler and the cudart headers and static library), point "
      "CUDA_HOME at it and CUDAHOSTCXX at a host compiler it supports, or build without CUDA: "
      "SETFORMER_CUDA=off.")
  else()
    set(SETFORMER_CUDA_DECISION "not compiled: ${problem}")
  endif()
endif()

if(SETFORMER_CUDA_ENABLED)
  message(STATUS "setformer: CUDA ${SETFORMER_CUDA_DECISION} for ${CMAKE_CUDA_ARCHITECTURES}")
else()
  set(CMAKE_CUDA_ARCHITECTURES "")
  message(STATUS "setformer: CUDA ${SETFORMER_CUDA_DECISION}")
endif()
