// Prints the processors that a process may use by its affinity (argument 1), a file with the text of /proc/self/cgroup
// (argument 2) and the folder where control groups are mounted (argument 3); without arguments, those of this process.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "base/cpus.h"

int main(int count, char** arguments) {
  if (count == 1) {
    std::printf("%d\n", fastff::usable_processors());
    return 0;
  }
  std::ostringstream memberships;
  memberships << std::ifstream(arguments[2]).rdbuf();
  std::printf("%d\n", fastff::processors_within_quota(std::atoi(arguments[1]), memberships.str(), arguments[3]));
  return 0;
}
