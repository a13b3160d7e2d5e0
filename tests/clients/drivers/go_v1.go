// The AWS SDK for Go, version 1, driven as clients/driving.py says.
package main

import (
	"encoding/json"
	"os"
	"time"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/awserr"
	"github.com/aws/aws-sdk-go/aws/request"
	"github.com/aws/aws-sdk-go/aws/session"
	"github.com/aws/aws-sdk-go/service/ec2"
)

type object map[string]interface{}

func shown(task *ec2.BundleTask) object {
	return object{"id": *task.BundleId, "state": *task.State}
}

func bundle(client *ec2.EC2, rest []string, dryRun bool) (object, error) {
	s3 := &ec2.S3Storage{
		AWSAccessKeyId:        aws.String(os.Getenv("AWS_ACCESS_KEY_ID")),
		Bucket:                &rest[1],
		Prefix:                &rest[2],
		UploadPolicy:          []byte(rest[3]),
		UploadPolicySignature: &rest[4],
	}
	input := &ec2.BundleInstanceInput{InstanceId: &rest[0], Storage: &ec2.Storage{S3: s3}, DryRun: &dryRun}
	output, err := client.BundleInstance(input)
	if err != nil {
		return nil, err
	}
	return shown(output.BundleTask), nil
}

func describe(client *ec2.EC2, input *ec2.DescribeBundleTasksInput) ([]object, error) {
	output, err := client.DescribeBundleTasks(input)
	tasks := []object{}
	if err == nil {
		for _, task := range output.BundleTasks {
			tasks = append(tasks, shown(task))
		}
	}
	return tasks, err
}

func wait(client *ec2.EC2, id string) (object, error) {
	input := &ec2.DescribeBundleTasksInput{BundleIds: []*string{&id}}
	delay := request.WithWaiterDelay(request.ConstantWaiterDelay(time.Second))
	if err := client.WaitUntilBundleTaskCompleteWithContext(aws.BackgroundContext(), input, delay); err != nil {
		return nil, err
	}
	tasks, err := describe(client, input)
	return tasks[0], err
}

func cancel(client *ec2.EC2, id string) (object, error) {
	output, err := client.CancelBundleTask(&ec2.CancelBundleTaskInput{BundleId: &id})
	if err != nil {
		return nil, err
	}
	return shown(output.BundleTask), nil
}

func run(client *ec2.EC2, action string, rest []string) (object, error) {
	switch action {
	case "bundle":
		return bundle(client, rest, false)
	case "dry-run":
		return bundle(client, rest, true)
	case "describe":
		filter := &ec2.Filter{Name: aws.String("s3-prefix"), Values: []*string{&rest[0]}}
		tasks, err := describe(client, &ec2.DescribeBundleTasksInput{Filters: []*ec2.Filter{filter}})
		return object{"tasks": tasks}, err
	case "wait":
		return wait(client, rest[0])
	case "cancel":
		return cancel(client, rest[0])
	default:
		return object{"version": aws.SDKVersion}, nil
	}
}

func main() {
	region := os.Getenv("AWS_DEFAULT_REGION")
	config := &aws.Config{Endpoint: &os.Args[2], Region: &region, MaxRetries: aws.Int(0)}
	answer, err := run(ec2.New(session.Must(session.NewSession(config))), os.Args[1], os.Args[3:])
	if refusal, ok := err.(awserr.Error); ok {
		answer = object{"error": refusal.Code()}
	} else if err != nil {
		panic(err)
	}
	json.NewEncoder(os.Stdout).Encode(answer)
}
