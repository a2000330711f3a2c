#include "base/cpus.h"

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>
#include <vector>

namespace fastff {
namespace {

constexpr double kNoQuota = std::numeric_limits<double>::infinity();

double processors_of(double quota_us, double period_us) {
  return quota_us > 0 && period_us > 0 ? quota_us / period_us : kNoQuota;
}

// Version 2: "<quota> <period>" in microseconds, "max" for no quota.
double quota_of_v2(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  double quota = 0, period = 0;
  return file >> quota >> period ? processors_of(quota, period) : kNoQuota;
}

// Version 1: two files, a quota of -1 for none.
double quota_of_v1(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
  double quota = 0, period = 0;
  return quota_file >> quota && period_file >> period ? processors_of(quota, period) : kNoQuota;
}

// The least quota of a group and of those it lies in, up to the mount. Inside a container the group's path may be one of
// the host, which the mount lacks: then the mount itself is the container's group.
template <class Quota>
double least_quota(const std::string& mount, std::string path, const Quota& quota) {
  double least = quota(mount);
  for (; path.size() > 1; path.erase(path.rfind('/'))) least = std::min(least, quota(mount + path));
  return least;
}

bool has_controller(const std::string& controllers, const std::string& wanted) {
  std::istringstream list(controllers);
  for (std::string name; std::getline(list, name, ',');)
    if (name == wanted) return true;
  return false;
}

// A line of /proc/self/cgroup: "<number>:<controllers>:<path>", without controllers for version 2.
double quota_of_line(const std::string& line, const std::string& root) {
  const size_t first = line.find(':'), second = line.find(':', first + 1);
  if (first == std::string::npos || second == std::string::npos) return kNoQuota;
  const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
  if (path.empty() || path[0] != '/') return kNoQuota;
  if (controllers.empty())
    return std::min(least_quota(root, path, quota_of_v2), least_quota(root + "/unified", path, quota_of_v2));
  if (!has_controller(controllers, "cpu")) return kNoQuota;
  return std::min(least_quota(root + "/cpu", path, quota_of_v1), least_quota(root + "/" + controllers, path, quota_of_v1));
}

std::string text_of(const char* path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

int processors_of_affinity() {
#ifdef __linux__
  // The mask of a host with more processors than cpu_set_t has bits needs a longer one.
  for (int bits = CPU_SETSIZE; bits <= 1 << 20; bits *= 2) {
    std::vector<cpu_set_t> mask(bits / CPU_SETSIZE);
    const size_t bytes = mask.size() * sizeof(cpu_set_t);
    if (sched_getaffinity(0, bytes, mask.data()) == 0) return CPU_COUNT_S(bytes, mask.data());
  }
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

int processors_within_quota(int available, const std::string& memberships, const std::string& root) {
  double least = kNoQuota;
  std::istringstream lines(memberships);
  for (std::string line; std::getline(lines, line);) least = std::min(least, quota_of_line(line, root));
  return std::max(1, static_cast<int>(std::min<double>(available, least)));
}

int usable_processors() {
  static const int found =
      processors_within_quota(processors_of_affinity(), text_of("/proc/self/cgroup"), "/sys/fs/cgroup");
  return found;
}

}  // namespace fastff
