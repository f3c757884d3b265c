# For which architectures nvcc compiles. The first of these variables that is set says so:
#   CMAKE_CUDA_ARCHITECTURES, CUDAARCHS   CMake's syntax, "75-real;90", also all, all-major, native
#   TORCH_CUDA_ARCH_LIST                  torch's, "8.0;9.0a+PTX", and its names, "Hopper"
# else it is every architecture below that nvcc knows, with PTX of the newest so that later devices
# can run it. Devices of 8.6 and 8.9 run the code of 8.0: their own would be 0.4 % shorter
# (instructions of all kernels), and take a quarter of the time of the build.
set(SETFORMER_USUAL_ARCHITECTURES 75 80 90 100 120)

# The letters after a number that CMake passes on to nvcc.
set(SETFORMER_VARIANTS a)
if(CMAKE_VERSION VERSION_GREATER_EQUAL 4.1)
  set(SETFORMER_VARIANTS af)
endif()

# What torch's names stand for; of two that match the longer comes first.
set(SETFORMER_TORCH_NAMES
  "Volta\\+Tegra=7.2" "Volta=7.0+PTX" "Turing=7.5+PTX" "Ampere\\+Tegra=8.7" "Ampere=8.0 8.6+PTX"
  "Ada=8.9+PTX" "Hopper=9.0+PTX" "Blackwell\\+Tegra=11.0" "Blackwell=10.0 10.3 12.0 12.1+PTX")

# Leaves in given which variable asks for architectures, and how, and in entries what it asks for;
# nothing where none does.
function(setformer_read_architectures given entries)
  set(${given} "" PARENT_SCOPE)
  set(${entries} "" PARENT_SCOPE)
  set(CUDAARCHS "$ENV{CUDAARCHS}")
  set(TORCH_CUDA_ARCH_LIST "$ENV{TORCH_CUDA_ARCH_LIST}")
  foreach(name CMAKE_CUDA_ARCHITECTURES CUDAARCHS TORCH_CUDA_ARCH_LIST)
    set(found "${${name}}")
    if(name STREQUAL "TORCH_CUDA_ARCH_LIST")
      foreach(pair IN LISTS SETFORMER_TORCH_NAMES)
        string(REGEX MATCH "^(.*)=(.*)$" pair "${pair}")
        string(REGEX REPLACE "${CMAKE_MATCH_1}" "${CMAKE_MATCH_2}" found "${found}")
      endforeach()
      string(REGEX REPLACE "[ ,;]+" ";" found "${found}")
    endif()
    list(REMOVE_ITEM found "")
    if(NOT found STREQUAL "")
      set(${given} "${name}=\"${${name}}\"" PARENT_SCOPE)
      set(${entries} "${found}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

# Does nvcc compile for an architecture in CMake's syntax? Words instead of numbers, and OFF for
# nvcc's own choice, may only be all that is wanted.
function(setformer_ask_nvcc answer architecture wanted)
  set(${answer} OFF PARENT_SCOPE)
  if(architecture MATCHES "^([0-9]+[${SETFORMER_VARIANTS}]?)(-real|-virtual)?$")
    set(flag "-gencode=arch=compute_${CMAKE_MATCH_1},code=sm_${CMAKE_MATCH_1}")
  elseif(wanted MATCHES "^(all|all-major|native)$")
    set(flag "-arch=${wanted}")
  elseif(wanted STREQUAL "OFF")
    set(flag "")
  else()
    return()
  endif()
  execute_process(
    COMMAND "${CMAKE_CUDA_COMPILER}" -ccbin "${CMAKE_CUDA_HOST_COMPILER}" ${flag} --dryrun
            -c "${CMAKE_BINARY_DIR}/nvcc_probe.cu"
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(status EQUAL 0 AND NOT output MATCHES "Cannot find valid GPU")
    set(${answer} ON PARENT_SCOPE)
  endif()
endfunction()

# Sets CMAKE_CUDA_ARCHITECTURES to those wanted that nvcc knows, and leaves in problem the others.
function(setformer_choose_architectures problem)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE listed)
  string(REGEX MATCHALL "[0-9]+" listed "${listed}") # and variants of these, such as 90a
  setformer_read_architectures(given entries)
  set(architectures)
  set(unknown)
  foreach(entry IN LISTS entries)
    string(REGEX REPLACE "^([0-9]+)\\.([0-9][a-z]?)$" "\\1\\2-real" architecture "${entry}")
    string(REGEX REPLACE "^([0-9]+)\\.([0-9][a-z]?)\\+PTX$" "\\1\\2" architecture "${architecture}")
    setformer_ask_nvcc(is_known "${architecture}" "${entries}")
    if(is_known)
      list(APPEND architectures "${architecture}")
    else()
      list(APPEND unknown "${entry}")
    endif()
  endforeach()
  if(NOT given)
    set(given "the usual architectures")
    set(unknown ${SETFORMER_USUAL_ARCHITECTURES})
    foreach(number IN LISTS unknown)
      if(number IN_LIST listed)
        list(APPEND architectures "${number}-real")
        set(newest "${number}-virtual")
      endif()
    endforeach()
    if(architectures)
      list(APPEND architectures "${newest}")
      set(unknown)
    endif()
  endif()

  set(${problem} "" PARENT_SCOPE)
  if(unknown)
    list(JOIN unknown ", " unknown)
    list(JOIN listed ", " listed)
    set(${problem} "nvcc cannot compile for ${unknown} of ${given} (it knows ${listed})" PARENT_SCOPE)
  endif()
  if(architectures)
    set(CMAKE_CUDA_ARCHITECTURES "${architectures}" CACHE STRING "CUDA architectures")
  endif()
  set(CMAKE_CUDA_ARCHITECTURES "${architectures}" PARENT_SCOPE)
endfunction()

# Kernels that use nothing newer than the compute capability `newest` need no other PTX for all
# later devices: that of each would multiply the build time, and so it is the PTX that tests run.
# No code is made for architectures before `least` or after `most`, unless there are no others; PTX
# beyond `most`, for devices that are not known, is made all the same. Leaves an empty list where the
# architectures are not plain numbers ("native", "90a"): CMake knows those.
function(setformer_share_ptx options least newest most)
  set(${options} "" PARENT_SCOPE)
  set(code)
  set(wanted)
  foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
    if(NOT architecture MATCHES "^([0-9]+)(-real|-virtual)?$")
      return()
    endif()
    if(NOT CMAKE_MATCH_1 LESS least AND
       (NOT CMAKE_MATCH_1 GREATER most OR NOT CMAKE_MATCH_2 STREQUAL "-real"))
      list(APPEND wanted "${architecture}")
    endif()
  endforeach()
  if(NOT wanted)
    set(wanted "${CMAKE_CUDA_ARCHITECTURES}")
  endif()
  foreach(architecture IN LISTS wanted)
    string(REGEX MATCH "^([0-9]+)(-real|-virtual)?$" architecture "${architecture}")
    set(number "${CMAKE_MATCH_1}")
    set(kind "${CMAKE_MATCH_2}")
    set(ptx "${number}")
    if(number GREATER newest)
      set(ptx "${newest}")
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
