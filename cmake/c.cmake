# What a C program needs: the header, libfastff.so.<ABI version>, a static library, and files for pkg-config and CMake.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

file(STRINGS csrc/fastff.h abi REGEX "define FASTFF_ABI_VERSION")
string(REGEX MATCH "[0-9]+" abi "${abi}")
set_target_properties(fastff PROPERTIES SOVERSION ${abi} VERSION ${abi}.${PROJECT_VERSION})

add_library(fastff_static STATIC $<TARGET_OBJECTS:fastff_objects>)
set_target_properties(fastff_static PROPERTIES OUTPUT_NAME fastff)
target_link_libraries(fastff_static PRIVATE Threads::Threads)

install(TARGETS fastff fastff_static EXPORT fastff INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES csrc/fastff.h csrc/model/fastff_model.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/fastff)
install(EXPORT fastff NAMESPACE fastff:: FILE fastffTargets.cmake DESTINATION ${package})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/fastffConfigVersion.cmake COMPATIBILITY SameMajorVersion)
install(FILES cmake/fastffConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/fastffConfigVersion.cmake DESTINATION ${package})

configure_file(cmake/fastff.pc.in fastff.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/fastff.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
