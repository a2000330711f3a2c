// How many processors this process may use.
#pragma once

#include <string>

namespace fastff {

// Of its affinity mask, and at most the whole ones of its control groups' quotas (versions 1 and 2); at least 1. Found
// once: a mask or a quota that changes later is not seen.
int usable_processors();

// The same of given facts. available: processors of the affinity mask. memberships: the text of /proc/self/cgroup.
// root: the folder where control groups are mounted.
int processors_within_quota(int available, const std::string& memberships, const std::string& root);

}  // namespace fastff
