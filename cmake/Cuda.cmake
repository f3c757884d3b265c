# Decides whether CUDA is compiled, for which architectures, and says why. Sets
#   SETFORMER_CUDA_ENABLED, SETFORMER_CUDA_DECISION (one line), CMAKE_CUDA_ARCHITECTURES,
#   SETFORMER_CUDA_OPTIONS (of the compiler), SETFORMER_CUDA_CODE and, for kernels of clusters,
#   SETFORMER_CLUSTER_CODE (of a source).
include("${CMAKE_CURRENT_LIST_DIR}/CudaArchitectures.cmake")

set(SETFORMER_CUDA_DEFAULT auto)
if(NOT "$ENV{SETFORMER_CUDA}" STREQUAL "")
  set(SETFORMER_CUDA_DEFAULT "$ENV{SETFORMER_CUDA}")
endif()
set(SETFORMER_CUDA "${SETFORMER_CUDA_DEFAULT}" CACHE STRING "Compile CUDA: auto, on or off")
setformer_check_choice(SETFORMER_CUDA auto on off)

# Where an environment variable names a toolkit, that one wins over PATH. Leaves in remarks those
# that name a folder without nvcc.
function(setformer_find_nvcc remarks)
  find_program(SETFORMER_NVCC nvcc
    HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
    PATHS /usr/local/cuda
    DOC "CUDA compiler")
  set(found "")
  foreach(name CUDA_HOME CUDA_PATH)
    if(NOT "$ENV{${name}}" STREQUAL "" AND NOT EXISTS "$ENV{${name}}/bin/nvcc")
      string(APPEND found ", but there is no bin/nvcc in ${name}=\"$ENV{${name}}\"")
    endif()
  endforeach()
  set(${remarks} "${found}" PARENT_SCOPE)
endfunction()

# Leaves in problem the variable that asks for fast math: no later flag of nvcc undoes that.
function(setformer_find_fast_math problem)
  set(fast "fast[-_]math|-Ofast([^-]|$)|finite-math|unsafe-math"
           "ftz[ =](true|1)|prec-(div|sqrt)[ =](false|0)")
  list(JOIN fast "|" fast)
  set(${problem} "" PARENT_SCOPE)
  foreach(name CMAKE_CUDA_FLAGS CUDAFLAGS NVCC_PREPEND_FLAGS NVCC_APPEND_FLAGS)
    set(flags "${${name}}$ENV{${name}}")
    if(flags MATCHES "${fast}")
      set(${problem} "${name}=\"${flags}\" asks for fast math, which makes numbers wrong" PARENT_SCOPE)
    endif()
  endforeach()
endfunction()

# Leaves in problem what hinders nvcc from making a program that does nothing: most often a host
# compiler that it does not support.
function(setformer_probe_nvcc problem)
  set(probe "${CMAKE_BINARY_DIR}/nvcc_probe.cu")
  file(WRITE "${probe}" "int main() {}\n")
  separate_arguments(flags UNIX_COMMAND "${CMAKE_CUDA_FLAGS} $ENV{CUDAFLAGS}")
  execute_process(
    COMMAND "${CMAKE_CUDA_COMPILER}" -ccbin "${CMAKE_CUDA_HOST_COMPILER}" ${flags} "${probe}"
            -o "${probe}.out"
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  set(${problem} "" PARENT_SCOPE)
  if(NOT status EQUAL 0)
    set(given "host compiler ${CMAKE_CUDA_HOST_COMPILER}")
    foreach(name CUDACXX CUDAHOSTCXX CUDAFLAGS NVCC_PREPEND_FLAGS NVCC_APPEND_FLAGS)
      if(NOT "$ENV{${name}}" STREQUAL "")
        string(APPEND given ", ${name}=\"$ENV{${name}}\"")
      endif()
    endforeach()
    string(STRIP "it fails with status ${status}: ${output}" output)
    string(REGEX REPLACE "[\r\n]+" " | " output "${output}")
    set(${problem} "${CMAKE_CUDA_COMPILER} cannot compile (${given}): ${output}" PARENT_SCOPE)
  endif()
endfunction()

set(problem "") # why CUDA cannot be compiled
set(remarks "") # what is compiled otherwise than was asked for
if(SETFORMER_CUDA_CHOICE STREQUAL "off")
  set(problem "SETFORMER_CUDA=off")
else()
  if(NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}")
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    setformer_find_nvcc(remarks)
    set(CMAKE_CUDA_COMPILER "${SETFORMER_NVCC}")
  endif()
  if(NOT CMAKE_CUDA_HOST_COMPILER)
    set(CMAKE_CUDA_HOST_COMPILER "$ENV{CUDAHOSTCXX}")
  endif()
  if(NOT CMAKE_CUDA_HOST_COMPILER)
    set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
  endif()

  if(NOT CMAKE_CUDA_COMPILER)
    set(problem "nvcc was found neither in CUDA_HOME, CUDA_PATH and PATH nor in /usr/local/cuda")
  else()
    setformer_find_fast_math(problem)
  endif()
  if(NOT problem)
    setformer_probe_nvcc(problem)
  endif()
  if(NOT problem)
    setformer_choose_architectures(unknown)
    if(NOT CMAKE_CUDA_ARCHITECTURES)
      set(problem "${unknown}")
    elseif(unknown)
      string(APPEND remarks ", but ${unknown}")
    endif()
  endif()
endif()

set(complaints "${remarks}")
if(problem)
  string(APPEND complaints ", but ${problem}")
endif()
if(complaints AND SETFORMER_CUDA_CHOICE STREQUAL "on")
  message(FATAL_ERROR
    "SETFORMER_CUDA=on${complaints}.\n"
    "Correct what is named here, or install the CUDA toolkit (its compiler and the cudart headers "
    "and static library), point CUDA_HOME at it and CUDAHOSTCXX at a host compiler it supports; or "
    "build what is possible by SETFORMER_CUDA=auto, or without CUDA by SETFORMER_CUDA=off.")
elseif(problem)
  set(SETFORMER_CUDA_ENABLED OFF)
  set(SETFORMER_CUDA_DECISION "not compiled: ${problem}")
  set(CMAKE_CUDA_ARCHITECTURES "")
  message(STATUS "setformer: CUDA ${SETFORMER_CUDA_DECISION}")
else()
  set(SETFORMER_CUDA_ENABLED ON)
  enable_language(CUDA)
  setformer_share_ptx(SETFORMER_CUDA_CODE 0 80 999)
  # Devices of 12.0 give a block too little shared memory for any of the kernels of clusters.
  setformer_share_ptx(SETFORMER_CLUSTER_CODE 90 90 119)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.1) # whose PTX has no st.async: empty kernels
    set(SETFORMER_CLUSTER_CODE ${SETFORMER_CUDA_CODE})
  endif()
  # ptxas tells of registers that do not fit; compressed, the architectures take a fifth of the room.
  set(SETFORMER_CUDA_OPTIONS --expt-relaxed-constexpr -Xptxas=-warn-spills -Xfatbin=-compress-all)
  # Profilers show source lines. For many architectures these would be more than half of the module,
  # and whoever profiles compiles for one.
  list(LENGTH CMAKE_CUDA_ARCHITECTURES architectures)
  if(architectures LESS 4)
    list(APPEND SETFORMER_CUDA_OPTIONS -lineinfo)
  endif()
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13) # whose drivers all read it
    list(APPEND SETFORMER_CUDA_OPTIONS --compress-mode=size)
  endif()
  set(SETFORMER_CUDA_DECISION
      "compiled by nvcc ${CMAKE_CUDA_COMPILER_VERSION} (${CMAKE_CUDA_COMPILER})${remarks}")
  message(STATUS "setformer: compiling CUDA takes minutes; SETFORMER_CUDA=off in the environment "
                 "skips it, CUDAARCHS=90-real compiles for one architecture")
  message(STATUS "setformer: CUDA ${SETFORMER_CUDA_DECISION} for ${CMAKE_CUDA_ARCHITECTURES}")
endif()
